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
    """An instruction set. `code_offset` is what its dot4 subtracts from each 8-bit code."""

    name: str
    lanes: int
    needs: frozenset[str]
    dot4_small: Dot4  # codes below 16
    dot4_wide: Dot4  # codes below 256
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
    Isa("avx512vnni", 16, frozenset({"x86-64-v4", "avx512vnni"}), _vnni512, _vnni512),
    Isa("avxvnni", 8, frozenset({"x86-64-v3", "avxvnni"}), _vnni256, _vnni256),
    Isa("avx2", 8, frozenset({"x86-64-v3"}), _avx2_small, _avx2_wide),
    Isa("neon-dotprod", 4, frozenset({"dotprod"}), _neon, _neon_wide, wide_offset=128),
    Isa("generic", 4, frozenset(), _portable(4), _portable(4)),
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
