"""Activations quantized to int8, in the order in which the codes of packed weights meet them.

Quantized activations come in tiles of 4 tokens: quads (tiles, quads * 4) int32 of four int8
each, quad q of token t at q * 4 + t % 4; scale (tiles, groups, 4) float32; start (tiles, groups,
4) int32, what a group's sum of products begins with: -code_offset * sum of its int8 activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.group_linear import GroupFormat
from mlc_llm.kernels.cpu.isa import get_isa
from mlc_llm.kernels.cpu.vector_math import reduce_max, splat, vector_lanes

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
        """Return how many groups of four codes a word holds: 2 for 4 bits, 1 for 8."""
        return 8 // self.form.bits

    @property
    def words(self) -> int:
        """Return the number of words along the input."""
        return self.groups * self.form.words_per_group

    @property
    def quads(self) -> int:
        """Return the number of quads along the input."""
        return self.words * self.quads_per_word

    @property
    def code_offset(self) -> int:
        """Return what a code minus this is the weight in units of the scale."""
        isa = get_isa(self.isa)
        return self.form.zero_point - (isa.wide_offset if self.form.bits == 8 else 0)


def activation_shapes(tiles: Any, shape: Int8Shape) -> list[tuple[list[Any], str]]:
    """Return shapes and dtypes of quads, scale and start."""
    return [
        ([tiles, shape.quads * TILE], "int32"),
        ([tiles, shape.groups, TILE], "float32"),
        ([tiles, shape.groups, TILE], "int32"),
    ]


def quantize_activations(shape: Int8Shape) -> Any:
    """Quantize: x (n, in) float32 -> quads, scale, start (see the module).

    Each group of a token has the scale max|x| / 127. The quad j of a word holds the inputs that
    meet the codes extracted together: for 4 bits every second one, for 8 bits neighbours.
    """
    features, groups, group_size = shape.in_features, shape.groups, shape.form.group_size
    per_word, quads_per_word = shape.form.values_per_word, shape.quads_per_word
    words_per_group, code_offset = shape.form.words_per_group, shape.code_offset
    quads = shape.quads

    lanes = vector_lanes(group_size)
    vectors = group_size // lanes
    # Full groups are read in place; the last one may end inside.
    whole_groups = features // group_size

    @T.macro
    def one_group(
        row: T.handle,
        codes: T.handle,
        best: T.handle,
        quad: T.handle,
        scale: T.handle,
        start: T.handle,
        t: T.int32,
        g: T.int32,
    ) -> None:
        best[T.ramp(0, 1, lanes)] = splat(T.float32(0), lanes)
        for v in T.unroll(vectors):
            best[T.ramp(0, 1, lanes)] = T.max(
                best[T.ramp(0, 1, lanes)], T.abs(row[T.ramp(v * lanes, 1, lanes)])
            )
        best[0] = reduce_max(best[T.ramp(0, 1, lanes)], lanes)
        scale[t // TILE, g, t % TILE] = best[0] * T.float32(1 / 127)
        best[0] = T.Select(best[0] > T.float32(0), T.float32(127) / best[0], T.float32(0))
        for v in T.unroll(vectors):
            codes[T.ramp(v * lanes, 1, lanes)] = T.Cast(
                f"int32x{lanes}",
                T.nearbyint(row[T.ramp(v * lanes, 1, lanes)] * splat(best[0], lanes)),
            )
        start[t // TILE, g, t % TILE] = _sum_codes(codes, lanes, vectors) * (-code_offset)
        for j in T.unroll(quads_per_word):
            quad[
                t // TILE,
                T.ramp(
                    (g * words_per_group * quads_per_word + j) * TILE + t % TILE,
                    quads_per_word * TILE,
                    words_per_group,
                ),
            ] = _join_bytes(codes, j, quads_per_word, per_word, words_per_group)

    @T.macro
    def one_token(
        x: T.handle, quad: T.handle, scale: T.handle, start: T.handle, t: T.int32
    ) -> None:
        row = T.alloc_buffer((group_size,), "float32")
        codes = T.alloc_buffer((group_size,), "int32")
        best = T.alloc_buffer((lanes,), "float32")
        for g in T.serial(whole_groups):
            for v in T.unroll(vectors):
                row[T.ramp(v * lanes, 1, lanes)] = x[
                    t, T.ramp(g * group_size + v * lanes, 1, lanes)
                ]
            one_group(row, codes, best, quad, scale, start, t, g)
        if whole_groups < groups:
            for k in T.serial(group_size):
                row[k] = T.float32(0)
            for k in T.serial(features - whole_groups * group_size):
                row[k] = x[t, whole_groups * group_size + k]
            one_group(row, codes, best, quad, scale, start, t, whole_groups)

    @T.prim_func(private=True, s_tir=True)
    def quantize_activations_kernel(
        x_handle: T.handle, quad_handle: T.handle, scale_handle: T.handle, start_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        tiles = T.int32()
        x = T.match_buffer(x_handle, (n, features), "float32")
        quad = T.match_buffer(quad_handle, (tiles, quads * TILE), "int32")
        scale = T.match_buffer(scale_handle, (tiles, groups, TILE), "float32")
        start = T.match_buffer(start_handle, (tiles, groups, TILE), "int32")
        if n < TILE:
            for t in T.serial(n):
                one_token(x, quad, scale, start, t)
        else:
            for t in T.parallel(n):
                one_token(x, quad, scale, start, t)

    return quantize_activations_kernel


def _sum_codes(codes: Any, lanes: int, vectors: int) -> Any:
    """Return the sum of a group's codes."""
    total = codes[T.ramp(0, 1, lanes)]
    for v in range(1, vectors):
        total = total + codes[T.ramp(v * lanes, 1, lanes)]
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.add.v{lanes}i32")
    return T.call_llvm_pure_intrin(intrinsic, total, dtype="int32")


def _join_bytes(codes: Any, j: Any, step: int, per_word: int, words: int) -> Any:
    """Return quad `j` of each of a group's words: four codes, `step` apart, as bytes."""
    low = splat(T.int32(255), words)
    quads = T.bitwise_and(codes[T.ramp(j, per_word, words)], low)
    for byte in (1, 2, 3):
        part = T.bitwise_and(codes[T.ramp(j + byte * step, per_word, words)], low)
        quads = T.bitwise_or(quads, T.shift_left(part, splat(T.int32(8 * byte), words)))
    return quads
