"""Linear layers of many experts that read the weights of routed experts only.

Packed weights are those of `linear.py`, `group_linear.py` and `int8_linear.py`, the blocks of one
expert after those of another; so is the arithmetic, whence a pair's result depends neither on the
other pairs nor on their number. Pairs, their order and the plan are those of `routing.py`. Results
have a row a pair. Work goes expert by expert while weights come from memory, and block by block
where experts have many rows, so that threads have equal shares whatever the routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.activations import TILE, Int8Shape
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.group_tiles import group_macros
from mlc_llm.kernels.cpu.int8_linear import GEMM_TOKENS
from mlc_llm.kernels.cpu.int8_tiles import int8_macros
from mlc_llm.kernels.cpu.isa import get_isa
from mlc_llm.kernels.cpu.linear import ROWS, TileRows, matmul_tile, num_blocks
from mlc_llm.kernels.cpu.vector_math import LANES

# Up to this many rows an expert on average, time goes to reading weights.
_STREAMED_ROWS = 8


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of a linear layer of experts.

    pairs_per_row: how many pairs read one row of activations: all of a token, or one.
    """

    num_experts: int
    out_features: int
    in_features: int
    pairs_per_row: int

    @property
    def blocks(self) -> int:
        """Return the number of 16-row blocks of one expert."""
        return num_blocks(self.out_features)

    @property
    def plan_size(self) -> int:
        """Return the length of the plan, see `routing.order_by_expert`."""
        return 2 * self.num_experts + 2


def _for_routed_experts(shape: ExpertShape, step: int, one_unit: Any) -> Any:
    """Return a macro (order, plan, number of pairs, operands): `one_unit` for all of the work.

    A unit is `step` blocks of an expert; the macro `one_unit` is given operands, order, the first
    block and the work: expert, first block of outputs, and the bounds of its pairs in `order`.
    """
    num_experts, blocks, units = shape.num_experts, shape.blocks, shape.blocks // step

    @T.macro
    def all_units(order: T.handle, plan: T.handle, pairs: T.int32, operands: T.meta_var) -> None:
        for unit in T.parallel(plan[num_experts + 1] * units):
            work = T.alloc_buffer((4,), "int32")
            if pairs <= _STREAMED_ROWS * plan[num_experts + 1]:
                work[0] = plan[num_experts + 2 + unit // units]
                work[1] = unit % units * step
            else:
                work[0] = plan[num_experts + 2 + unit % plan[num_experts + 1]]
                work[1] = unit // plan[num_experts + 1] * step
            work[2] = plan[work[0]]
            work[3] = plan[work[0] + 1]
            one_unit(*operands, order, work[0] * blocks + work[1], work)

    return all_units


def _routed_rows(place: Any, first: Any, end: Any) -> TileRows:
    """Return the rows of pairs in `place`, (2, count) int32, see `_find_rows`."""
    return TileRows(lambda i: place[0, i], lambda i: place[1, i], lambda i: first + i < end)


def _find_rows(shape: ExpertShape) -> Any:
    """Return a macro that finds the rows of `count` pairs from `first` on, the last one again
    where there are fewer: place[0] of activations, place[1] of results.
    """
    pairs_per_row = shape.pairs_per_row

    @T.macro
    def find(
        place: T.handle, order: T.handle, first: T.int32, end: T.int32, count: T.meta_var
    ) -> None:
        for i in T.unroll(count):
            place[1, i] = order[T.min(first + i, end - 1)]
            place[0, i] = place[1, i] // pairs_per_row

    return find


def matmul(shape: ExpertShape, dtype: str, rows: int = ROWS) -> Any:
    """Multiply: x float32, packed weights, order, plan -> (pairs, out) float32.

    x: (n, in), or (pairs, in) if pairs_per_row is 1. rows: how many share a load of weights.
    """
    in_features, out_features = shape.in_features, shape.out_features
    packed_shape = (shape.num_experts * shape.blocks, in_features, LANES)
    tile, find_rows = matmul_tile(in_features, out_features), _find_rows(shape)

    @T.macro
    def some_rows(
        x: T.handle,
        packed: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        b: T.int32,
        first: T.int32,
        end: T.int32,
        count: T.meta_var,
    ) -> None:
        place = T.alloc_buffer((2, count), "int32")
        find_rows(place, order, first, end, count)
        tile(x, packed, out, _routed_rows(place, first, end), block, b, count)

    @T.macro
    def one_unit(
        x: T.handle,
        packed: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        work: T.handle,
    ) -> None:
        if work[3] - work[2] == 1:
            some_rows(x, packed, out, order, block, work[1], work[2], work[3], 1)
        else:
            for m in T.serial((work[3] - work[2] + rows - 1) // rows):
                some_rows(x, packed, out, order, block, work[1], work[2] + m * rows, work[3], rows)

    all_units = _for_routed_experts(shape, 1, one_unit)

    @T.prim_func(private=True, s_tir=True)
    def expert_matmul_kernel(
        x_handle: T.handle,
        packed: T.Buffer(packed_shape, dtype),
        order_handle: T.handle,
        plan: T.Buffer((shape.plan_size,), "int32"),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        pairs = T.int32()
        x = T.match_buffer(x_handle, (n, in_features), "float32")
        order = T.match_buffer(order_handle, (pairs,), "int32")
        out = T.match_buffer(out_handle, (pairs, out_features), "float32")
        all_units(order, plan, pairs, (x, packed, out))

    return expert_matmul_kernel


def group_matmul(shape: ExpertShape, form: GroupFormat, rows: int = ROWS) -> Any:
    """Multiply: x float32, packed words and scales, order, plan -> (pairs, out) float32.

    x and rows: as for `matmul`.
    """
    in_features, out_features = shape.in_features, shape.out_features
    word_shape, scale_shape = _packed_shapes(shape, form)
    scale_dtype = form.scale_dtype
    macros, find_rows = group_macros(out_features, in_features, form, rows), _find_rows(shape)
    stream_row, unpack_block, multiply_rows = (
        macros.stream_row,
        macros.unpack_block,
        macros.multiply_rows,
    )
    unpacked_inputs = macros.unpacked_inputs

    @T.macro
    def one_row(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        work: T.handle,
    ) -> None:
        place = T.alloc_buffer((2, 1), "int32")
        find_rows(place, order, work[2], work[3], 1)
        stream_row(x, words, scales, out, _routed_rows(place, work[2], work[3]), block, work[1])

    @T.macro
    def some_rows(
        x: T.handle,
        weight: T.handle,
        out: T.handle,
        order: T.handle,
        b: T.int32,
        first: T.int32,
        end: T.int32,
    ) -> None:
        place = T.alloc_buffer((2, rows), "int32")
        find_rows(place, order, first, end, rows)
        multiply_rows(x, weight, out, _routed_rows(place, first, end), b)

    @T.macro
    def many_rows(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        work: T.handle,
    ) -> None:
        weight = T.alloc_buffer((unpacked_inputs, LANES), "float32")
        unpack_block(words, scales, weight, block)
        for m in T.serial((work[3] - work[2] + rows - 1) // rows):
            some_rows(x, weight, out, order, work[1], work[2] + m * rows, work[3])

    @T.macro
    def one_unit(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        work: T.handle,
    ) -> None:
        if work[3] - work[2] == 1:
            one_row(x, words, scales, out, order, block, work)
        else:
            many_rows(x, words, scales, out, order, block, work)

    all_units = _for_routed_experts(shape, 1, one_unit)

    @T.prim_func(private=True, s_tir=True)
    def expert_group_matmul_kernel(
        x_handle: T.handle,
        words: T.Buffer(word_shape, "uint32"),
        scales: T.Buffer(scale_shape, scale_dtype),
        order_handle: T.handle,
        plan: T.Buffer((shape.plan_size,), "int32"),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        pairs = T.int32()
        x = T.match_buffer(x_handle, (n, in_features), "float32")
        order = T.match_buffer(order_handle, (pairs,), "int32")
        out = T.match_buffer(out_handle, (pairs, out_features), "float32")
        all_units(order, plan, pairs, (x, words, scales, out))

    return expert_group_matmul_kernel


def _packed_shapes(
    shape: ExpertShape, form: GroupFormat
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of all experts' packed words and scales."""
    rows = shape.num_experts * shape.blocks * LANES
    return form.word_shape(rows, shape.in_features), form.scale_shape(rows, shape.in_features)


def int8_matmul(shape: ExpertShape, form: GroupFormat, isa: str) -> Any:
    """Multiply: quantized activations, packed words and scales, order, plan
    -> (pairs, out) float32.

    Activations are those of tokens, or of pairs if pairs_per_row is 1. Weights meet up to 8 rows
    at a time on their way from memory; experts with many rows leave them unpacked in the cache.
    """
    in_features, out_features = shape.in_features, shape.out_features
    int8_shape = Int8Shape(out_features, in_features, form, isa)
    macros, find_rows = int8_macros(int8_shape), _find_rows(shape)
    stream, unpack, wide = macros.stream, macros.unpack, macros.wide
    word_shape, scale_shape = _packed_shapes(shape, form)
    scale_dtype, width, quads = form.scale_dtype, int8_shape.width, int8_shape.quads
    factors = int8_shape.groups * form.scales_per_group
    most_rows = min(get_isa(isa).tokens, 2 * TILE)

    @T.macro
    def some_rows(
        quad: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        b: T.int32,
        first: T.int32,
        end: T.int32,
        count: T.meta_var,
    ) -> None:
        place = T.alloc_buffer((2, count), "int32")
        find_rows(place, order, first, end, count)
        stream(quad, words, scales, out, _routed_rows(place, first, end), block, b, count)

    @T.macro
    def few_rows(
        quad: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        b: T.int32,
        first: T.int32,
        end: T.int32,
    ) -> None:
        operands = T.meta_var((quad, words, scales, out, order, block, b))
        if end - first == 1:
            some_rows(*operands, first, end, 1)
        elif end - first == 2:
            some_rows(*operands, first, end, 2)
        elif most_rows == TILE:
            for m in T.serial((end - first + TILE - 1) // TILE):
                some_rows(*operands, first + m * TILE, end, TILE)
        else:
            # What is left is at most half of what goes together.
            for m in T.serial((end - first + TILE - 1) // (2 * TILE)):
                some_rows(*operands, first + m * 2 * TILE, end, 2 * TILE)
            if (end - first) % (2 * TILE) > 0:
                if (end - first) % (2 * TILE) <= TILE:
                    some_rows(
                        *operands, first + (end - first) // (2 * TILE) * (2 * TILE), end, TILE
                    )

    @T.macro
    def unpacked_tile(
        arrays: T.meta_var,
        order: T.handle,
        block: T.int32,
        b: T.int32,
        first: T.int32,
        end: T.int32,
        is_unpacking: T.meta_var,
    ) -> None:
        place = T.alloc_buffer((2, TILE), "int32")
        find_rows(place, order, first, end, TILE)
        unpack(*arrays, block, b, _routed_rows(place, first, end), 0, is_unpacking, False)

    @T.macro
    def many_rows(
        quad: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        b: T.int32,
        first: T.int32,
        end: T.int32,
    ) -> None:
        codes = T.alloc_buffer((quads, wide, LANES), "uint32")
        factor = T.alloc_buffer((factors, wide, LANES), "float32")
        arrays = T.meta_var((quad, words, scales, codes, factor, out))
        unpacked_tile(arrays, order, block, b, first, end, True)
        for m in T.serial((end - first - 1) // TILE):
            unpacked_tile(arrays, order, block, b, first + (m + 1) * TILE, end, False)

    @T.macro
    def one_unit(
        quad: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        order: T.handle,
        block: T.int32,
        work: T.handle,
    ) -> None:
        operands = T.meta_var((quad, words, scales, out, order))
        if work[3] - work[2] < GEMM_TOKENS:
            for r in T.serial(wide):
                few_rows(*operands, block + r, work[1] + r, work[2], work[3])
        else:
            many_rows(*operands, block, work[1], work[2], work[3])

    all_units = _for_routed_experts(shape, wide, one_unit)

    @T.prim_func(private=True, s_tir=True)
    def expert_int8_matmul_kernel(
        quad_handle: T.handle,
        words: T.Buffer(word_shape, "uint32"),
        scales: T.Buffer(scale_shape, scale_dtype),
        order_handle: T.handle,
        plan: T.Buffer((shape.plan_size,), "int32"),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        tiles = T.int32()
        pairs = T.int32()
        quad = T.match_buffer(quad_handle, (tiles, width * TILE), "int32")
        order = T.match_buffer(order_handle, (pairs,), "int32")
        out = T.match_buffer(out_handle, (pairs, out_features), "float32")
        all_units(order, plan, pairs, (quad, words, scales, out))

    return expert_int8_matmul_kernel
