"""Activations quantized to int8, in the order in which the codes of packed weights meet them.

Quantized activations are one int32 array (tiles, width * 4) of tiles of 4 tokens; entry e of token
t is at e * 4 + t % 4. First come quads, four int8 each; then a float32 scale for each group; then
for each group what its sum of products begins with: -code_offset * the sum of its int8 values.
Where groups of weights have a minimum, a float32 follows for each group: its scale * that sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.elementwise import rms_factor
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.isa import get_isa
from mlc_llm.kernels.cpu.vector_math import (
    lane_dtype,
    reduce_max,
    silu,
    span,
    splat,
    vector_lanes,
)

TILE = 4


@dataclass(frozen=True)
class Int8Shape:
    """What a kernel is specialised for; hashable, so that kernels can be memoised."""

    out_features: int
    in_features: int
    form: GroupFormat
    isa: str

    @property
    def groups(self) -> int:
        """Return the number of groups along the input."""
        return self.form.num_groups(self.in_features)

    @property
    def quads_per_word(self) -> int:
        """Return how many groups of four codes a (low) word holds: 1 for 8 bits, else 2."""
        return self.form.values_per_word // 4

    @property
    def words(self) -> int:
        """Return the number of words along the input."""
        return self.groups * self.form.words_per_group

    @property
    def quads(self) -> int:
        """Return the number of quads along the input."""
        return self.groups * self.form.group_size // 4

    @property
    def scale_at(self) -> int:
        """Return the first entry of scales in quantized activations."""
        return self.quads

    @property
    def start_at(self) -> int:
        """Return the first entry of what sums begin with."""
        return self.quads + self.groups

    @property
    def sum_at(self) -> int:
        """Return the first entry of what groups sum up to, where weights have minima."""
        return self.quads + 2 * self.groups

    @property
    def width(self) -> int:
        """Return the entries a token takes in quantized activations."""
        return self.quads + (3 if self.form.has_minimum else 2) * self.groups

    @property
    def code_offset(self) -> int:
        """Return what a code minus this is the weight in units of the scale."""
        isa = get_isa(self.isa)
        return self.form.zero_point - (isa.wide_offset if self.form.bits == 8 else 0)


@dataclass(frozen=True)
class Source:
    """Where the values to quantize come from; what is computed on the way needs no memory.

    "plain": x (n, in). "rms_norm": x (n, in) and its weight (in), see `elementwise.rms_norm`.
    "silu_mul": x (n, 2 * in), see `elementwise.silu_mul`.
    """

    kind: Literal["plain", "rms_norm", "silu_mul"] = "plain"
    weight_dtype: str = "float32"
    eps: float = 0.0


def source_values(
    source: Source, x: Any, weight: Any, factor: Any, t: Any, start: Any, features: int, count: int
) -> Any:
    """Return `count` of the `features` values of token t, from `start` on.

    factor: what `rms_factor` computed for the token, where the source is "rms_norm".
    """
    values = x[t, span(start, count)]
    if source.kind == "rms_norm":
        weights = T.Cast(lane_dtype("float32", count), weight[span(start, count)])
        return values * splat(factor[0], count) * weights
    if source.kind == "silu_mul":
        return silu(values, count) * x[t, span(features + start, count)]
    return values


def quantize_activations(shape: Int8Shape, source: Source) -> Any:
    """Quantize: x float32[, weight] -> (tiles, width * 4) int32 (see the module).

    Each group of a token has the scale max|x| / 127. The quad j of a word holds the inputs that
    meet the codes extracted together: for 4 bits every second one, for 8 bits neighbours.
    """
    features, groups, group_size = shape.in_features, shape.groups, shape.form.group_size
    code_offset, group_quads = shape.code_offset, group_size // 4
    scale_at, start_at, sum_at, width = shape.scale_at, shape.start_at, shape.sum_at, shape.width
    has_minimum = shape.form.has_minimum
    kind, weight_dtype = source.kind, source.weight_dtype
    x_width = 2 * features if kind == "silu_mul" else features
    lanes = vector_lanes(group_size)
    vectors = group_size // lanes
    # The last group may end inside.
    whole_groups = features // group_size
    rest = features - whole_groups * group_size
    square = rms_factor(features, source.eps)

    @T.macro
    def quantize_group(row: T.handle, out: T.handle, t: T.int32, g: T.int32) -> None:
        codes = T.alloc_buffer((group_size,), "int32")
        total = T.alloc_buffer((1,), "int32")
        best = T.alloc_buffer((lanes,), "float32")
        best[T.ramp(0, 1, lanes)] = splat(T.float32(0), lanes)
        for v in T.unroll(vectors):
            best[T.ramp(0, 1, lanes)] = T.max(
                best[T.ramp(0, 1, lanes)], T.abs(row[T.ramp(v * lanes, 1, lanes)])
            )
        best[0] = reduce_max(best[T.ramp(0, 1, lanes)], lanes)
        out[t // TILE, (scale_at + g) * TILE + t % TILE] = T.reinterpret(
            "int32", best[0] * T.float32(1 / 127)
        )
        best[0] = T.Select(best[0] > T.float32(1e-36), T.float32(127) / best[0], T.float32(0))
        for v in T.unroll(vectors):
            codes[T.ramp(v * lanes, 1, lanes)] = T.Cast(
                f"int32x{lanes}",
                T.nearbyint(row[T.ramp(v * lanes, 1, lanes)] * splat(best[0], lanes)),
            )
        total[0] = _sum_codes(codes, lanes, vectors)
        out[t // TILE, (start_at + g) * TILE + t % TILE] = total[0] * (-code_offset)
        if has_minimum:
            out[t // TILE, (sum_at + g) * TILE + t % TILE] = T.reinterpret(
                "int32",
                T.Cast("float32", total[0])
                * T.reinterpret("float32", out[t // TILE, (scale_at + g) * TILE + t % TILE]),
            )
        out[
            t // TILE,
            T.ramp(g * group_quads * TILE + t % TILE, TILE, group_quads),
        ] = _pack_quads(codes, shape)

    @T.macro
    def one_token(x: T.handle, weight: T.handle, out: T.handle, t: T.int32) -> None:
        row = T.alloc_buffer((group_size,), "float32")
        factor = T.alloc_buffer((1,), "float32")
        if kind == "rms_norm":
            square(x, factor, t)
        for g in T.serial(whole_groups):
            for v in T.unroll(vectors):
                row[span(v * lanes, lanes)] = source_values(
                    source, x, weight, factor, t, g * group_size + v * lanes, features, lanes
                )
            quantize_group(row, out, t, g)
        if whole_groups < groups:
            for k in T.serial(group_size):
                row[k] = T.float32(0)
            for k in T.serial(rest):
                row[k] = source_values(
                    source, x, weight, factor, t, whole_groups * group_size + k, features, 1
                )
            quantize_group(row, out, t, whole_groups)

    @T.macro
    def all_tokens(x: T.handle, weight: T.handle, out: T.handle, n: T.int32) -> None:
        if n < TILE:
            for t in T.serial(n):
                one_token(x, weight, out, t)
        else:
            for t in T.parallel(n):
                one_token(x, weight, out, t)

    if kind == "rms_norm":

        @T.prim_func(private=True, s_tir=True)
        def norm_and_quantize_kernel(
            x_handle: T.handle, weight_handle: T.handle, out_handle: T.handle
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            tiles = T.int32()
            x = T.match_buffer(x_handle, (n, x_width), "float32")
            weight = T.match_buffer(weight_handle, (features,), weight_dtype)
            out = T.match_buffer(out_handle, (tiles, width * TILE), "int32")
            all_tokens(x, weight, out, n)

        return norm_and_quantize_kernel

    @T.prim_func(private=True, s_tir=True)
    def quantize_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        tiles = T.int32()
        x = T.match_buffer(x_handle, (n, x_width), "float32")
        out = T.match_buffer(out_handle, (tiles, width * TILE), "int32")
        all_tokens(x, x, out, n)

    return quantize_kernel


def _sum_codes(codes: Any, lanes: int, vectors: int) -> Any:
    """Return the sum of a group's codes."""
    total = codes[T.ramp(0, 1, lanes)]
    for v in range(1, vectors):
        total = total + codes[T.ramp(v * lanes, 1, lanes)]
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.add.v{lanes}i32")
    return T.call_llvm_pure_intrin(intrinsic, total, dtype="int32")


def _pack_quads(codes: Any, shape: Int8Shape) -> Any:
    """Return a group's codes as quads: byte i of quad j of a word is its input j + i * quads."""
    size, per_word, quads = shape.form.group_size, shape.form.values_per_word, shape.quads_per_word
    lanes = vector_lanes(size)
    parts = [
        T.Cast(f"int8x{lanes}", codes[T.ramp(start, 1, lanes)]) for start in range(0, size, lanes)
    ]
    order = [
        word + quad + byte * quads
        for word in range(0, size, per_word)
        for quad in range(quads)
        for byte in range(4)
    ]
    return T.reinterpret(f"int32x{size // 4}", T.Shuffle(parts, order))
