"""Instruction sets as data: how wide a vector is, and how four 8-bit products are summed.

`dot4` is the one operation in which instruction sets differ. Everything else is plain vector
arithmetic that LLVM lowers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

# (accumulator int32, codes uint32 of 4 bytes each, quad int32 of 4 signed bytes) -> accumulator,
# all vectors of the same number of lanes.
Dot4 = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Isa:
    """An instruction set. `wide_offset` is what its dot4 subtracts from each 8-bit code.

    tokens: how many share a load of weights, as far as it pays to keep their sums in registers.
    """

    name: str
    lanes: int
    needs: frozenset[str]
    dot4_small: Dot4  # codes below 16
    dot4_wide: Dot4  # codes below 256
    tokens: int
    wide_offset: int = 0


def _call(name: str, dtype: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def _bytes(x: Any, kind: str, lanes: int) -> Any:
    return T.reinterpret(f"{kind}8x{4 * lanes}", x)


def _vnni512(acc: Any, codes: Any, quad: Any) -> Any:
    return _call(
        "llvm.x86.avx512.vpdpbusd.512",
        "int32x16",
        acc,
        _bytes(codes, "uint", 16),
        _bytes(quad, "int", 16),
    )


def _vnni256(acc: Any, codes: Any, quad: Any) -> Any:
    return _call(
        "llvm.x86.avx512.vpdpbusd.256",
        "int32x8",
        acc,
        _bytes(codes, "uint", 8),
        _bytes(quad, "int", 8),
    )


def _avx2_small(acc: Any, codes: Any, quad: Any) -> Any:
    # Pairs stay below 2 * 15 * 127, far from the saturation of the 16-bit sums.
    pairs = _call(
        "llvm.x86.avx2.pmadd.ub.sw",
        "int16x16",
        _bytes(codes, "uint", 8),
        _bytes(quad, "int", 8),
    )
    ones = T.broadcast(T.int16(1), 16)
    return acc + _call("llvm.x86.avx2.pmadd.wd", "int32x8", pairs, ones)


def _avx2_wide(acc: Any, codes: Any, quad: Any) -> Any:
    mask = T.broadcast(T.uint32(0x0F0F0F0F), 8)
    low = T.bitwise_and(codes, mask)
    high = T.bitwise_and(T.shift_right(codes, T.broadcast(T.uint32(4), 8)), mask)
    zero = T.broadcast(T.int32(0), 8)
    sixteen = T.broadcast(T.int32(16), 8)
    return _avx2_small(acc, low, quad) + _avx2_small(zero, high, quad) * sixteen


def _neon(acc: Any, codes: Any, quad: Any) -> Any:
    return _call(
        "llvm.aarch64.neon.sdot.v4i32.v16i8",
        "int32x4",
        acc,
        _bytes(codes, "int", 4),
        _bytes(quad, "int", 4),
    )


def _neon_wide(acc: Any, codes: Any, quad: Any) -> Any:
    # Signed products only: flipping the top bit subtracts 128 from every code.
    return _neon(acc, T.bitwise_xor(codes, T.broadcast(T.uint32(0x80808080), 4)), quad)


def _portable(lanes: int) -> Dot4:
    def dot4(acc: Any, codes: Any, quad: Any) -> Any:
        for byte in range(4):
            shift = T.broadcast(T.uint32(8 * byte), lanes)
            code = T.bitwise_and(T.shift_right(codes, shift), T.broadcast(T.uint32(255), lanes))
            up = T.broadcast(T.int32(24 - 8 * byte), lanes)
            down = T.broadcast(T.int32(24), lanes)
            signed = T.shift_right(T.shift_left(quad, up), down)
            acc = acc + T.Cast(f"int32x{lanes}", code) * signed
        return acc

    return dot4


# Best first; the last one runs anywhere.
ISAS = (
    Isa("avx512vnni", 16, frozenset({"x86-64-v4", "avx512vnni"}), _vnni512, _vnni512, 8),
    Isa("avxvnni", 8, frozenset({"x86-64-v3", "avxvnni"}), _vnni256, _vnni256, 4),
    Isa("avx2", 8, frozenset({"x86-64-v3"}), _avx2_small, _avx2_wide, 8),
    Isa("neon-dotprod", 4, frozenset({"dotprod"}), _neon, _neon_wide, 4, wide_offset=128),
    Isa("generic", 4, frozenset(), _portable(4), _portable(4), 4),
)

_X86_LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")


def find_isa(features: Collection[str]) -> Isa:
    """Return the best instruction set for a CPU level and features, as `HostCPU.isa` names them."""
    have = set(features)
    for index, level in enumerate(_X86_LEVELS):
        if level in have:
            have.update(_X86_LEVELS[:index])
    return next(isa for isa in ISAS if isa.needs <= have)


def get_isa(name: str) -> Isa:
    """Return the instruction set called `name`."""
    return next(isa for isa in ISAS if isa.name == name)


@dataclass(frozen=True)
class Bf16Isa:
    """An instruction set that multiplies bfloat16 pairs, as functions in LLVM's language.

    Vectors have 16 lanes; a pair is an int32, its first value in the low half. `module` defines
    `dot`: (sum float32x16, pairs, pairs) -> sum plus both products of each lane, and `join`: two
    float32x16, neighbours -> pairs, rounded to nearest even.

    LLVM code, because TVM turns bfloat16 operands of an intrinsic into float32 ones.
    """

    name: str
    needs: frozenset[str]
    module: str
    dot: str
    join: str


BF16_ISAS = (
    Bf16Isa(
        "avx512bf16",
        frozenset({"x86-64-v4", "avx512bf16"}),
        """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @mlc_bf16_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

define <16 x i32> @mlc_bf16_join(<16 x float> %low, <16 x float> %high) {
  %both = shufflevector <16 x float> %low, <16 x float> %high, <32 x i32> <
      i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
      i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15,
      i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23,
      i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %rounded = fptrunc <32 x float> %both to <32 x bfloat>
  %r = bitcast <32 x bfloat> %rounded to <16 x i32>
  ret <16 x i32> %r
}
""",
        "mlc_bf16_dot",
        "mlc_bf16_join",
    ),
)


def find_bf16_isa(features: Collection[str]) -> Bf16Isa | None:
    """Return the instruction set for bfloat16 of a CPU with these features, if it has one."""
    have = set(features)
    return next((isa for isa in BF16_ISAS if isa.needs <= have), None)


def get_bf16_isa(name: str) -> Bf16Isa:
    """Return the instruction set for bfloat16 called `name`."""
    return next(isa for isa in BF16_ISAS if isa.name == name)
