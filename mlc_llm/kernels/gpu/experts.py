"""Products with the weights of experts, pair by pair or in tiles of pairs of one expert.

Pairs, orders and plans are those of `routing.py`. Threads are bound by hand; sums are float32, in
an order that does not depend on other pairs. Only weights of chosen experts are read.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.kernels.gpu.expert_weights import ExpertWeights
from mlc_llm.kernels.gpu.routing import TILE, few_tokens, num_tiles

# Pair by pair: threads of a block, how many share an output at most, outputs that each has.
_THREADS, _ACROSS, _OUTPUTS = 128, 32, 2
# Tiles: outputs of a block, and the corner of the tile that each thread has, in pairs and outputs.
_COLUMNS, _CORNER = 64, (8, 4)
# Inputs that are in shared memory at a time, at least.
_DEPTH = 32


def matmul(
    weights: ExpertWeights, routing: Routing, is_pairs: bool, dtype: str, load_bytes: int
) -> Any:
    """Multiply: x of dtype, weights or words and scales, experts (n, top_k), order, plan
    -> (n * top_k, out) of dtype.

    x: (n, in), a row a token, or (n * top_k, in), a row a pair, if is_pairs. load_bytes: what a
    thread loads at once. Steps of up to `few_tokens` tokens read the rows of each pair's expert,
    others those of each expert once for `TILE` pairs.
    """
    experts, top_k, few = routing.num_experts, routing.top_k, few_tokens(routing)
    in_features, out_features = weights.in_features, weights.out_features
    (word_shape, scale_shape), word_dtype = weights.shapes, weights.held[1]
    pairs_per_row = 1 if is_pairs else top_k
    multiply_pairs = _pair_steps(weights, top_k, pairs_per_row, dtype, load_bytes)
    multiply_tiles = _tile_steps(weights, pairs_per_row, dtype, load_bytes)

    @T.macro
    def multiply(
        stored: T.meta_var,
        chosen: T.handle,
        order: T.handle,
        plan: T.handle,
        out: T.handle,
        n: T.int32,
    ) -> None:
        if n <= few:
            multiply_pairs(stored, chosen, out, n * top_k)
        else:
            multiply_tiles(stored, order, plan, out, num_tiles(n * top_k, experts))

    if weights.form is not None:

        @T.prim_func(private=True, s_tir=True)
        def expert_group_kernel(
            x_handle: T.handle,
            words: T.Buffer(word_shape, "uint32"),
            scales: T.Buffer(scale_shape, weights.form.scale_dtype),
            chosen_handle: T.handle,
            order_handle: T.handle,
            plan_handle: T.handle,
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            n, rows, pairs, size = T.int32(), T.int32(), T.int32(), T.int32()
            x = T.match_buffer(x_handle, (rows, in_features), dtype)
            chosen = T.match_buffer(chosen_handle, (n, top_k), "int32")
            order = T.match_buffer(order_handle, (pairs,), "int32")
            plan = T.match_buffer(plan_handle, (size,), "int32")
            out = T.match_buffer(out_handle, (pairs, out_features), dtype)
            multiply((x, words, scales), chosen, order, plan, out, n)

        return expert_group_kernel

    @T.prim_func(private=True, s_tir=True)
    def expert_kernel(
        x_handle: T.handle,
        weight: T.Buffer(word_shape, word_dtype),
        chosen_handle: T.handle,
        order_handle: T.handle,
        plan_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, rows, pairs, size = T.int32(), T.int32(), T.int32(), T.int32()
        x = T.match_buffer(x_handle, (rows, in_features), dtype)
        chosen = T.match_buffer(chosen_handle, (n, top_k), "int32")
        order = T.match_buffer(order_handle, (pairs,), "int32")
        plan = T.match_buffer(plan_handle, (size,), "int32")
        out = T.match_buffer(out_handle, (pairs, out_features), dtype)
        multiply((x, weight, weight), chosen, order, plan, out, n)

    return expert_kernel


def _row_loader(
    count: int, step: int, in_features: int, dtype: str, load_bytes: int
) -> tuple[Any, Any]:
    """Return a macro load(x, items, row, start), of `count` inputs from `start` on, and the
    function (items, i, start) of their values: float32, 0 past the end.

    step: inputs that are read together, by all threads that share a row.
    """
    most = max(4, load_bytes // (4 if dtype == "float32" else 2))
    lanes = math.gcd(math.gcd(count, in_features), most)
    is_even = in_features % step == 0

    def within(column: Any) -> Any:
        return column if is_even else T.min(column, in_features - lanes)

    @T.macro
    def load(x: T.handle, items: T.handle, row: T.int32, start: T.int32) -> None:
        for v in T.unroll(count // lanes):
            first: T.let = within(start + v * lanes)
            for w in T.vectorized(lanes):
                items[v * lanes + w] = x[row, first + w]

    def value(items: Any, i: Any, start: Any) -> Any:
        item = T.Cast("float32", items[i])
        return item if is_even else T.Select(start + i < in_features, item, T.float32(0))

    return load, value


def _pair_steps(
    weights: ExpertWeights, top_k: int, pairs_per_row: int, dtype: str, load_bytes: int
) -> Any:
    """Return a macro that launches the kernel: multiply(stored, chosen, out, pairs).

    A block has some outputs of one pair. Threads side by side share an output; each sums some
    units of it, then one joins the sums.
    """
    unit, units, out_features = weights.unit, weights.num_units, weights.out_features
    (held_size, held_dtype), weight = weights.held, weights.value
    across = min(_ACROSS, max(_OUTPUTS, 1 << (units - 1).bit_length()))
    deep, stride = _THREADS // across, across + 1
    block = deep * _OUTPUTS  # outputs of a block, no more than its threads
    load_unit = weights.loader(load_bytes)
    load_row, item = _row_loader(unit, unit, weights.in_features, dtype, load_bytes)

    @T.macro
    def multiply_pairs(stored: T.meta_var, chosen: T.handle, out: T.handle, pairs: T.int32) -> None:
        for b in T.thread_binding((out_features + block - 1) // block, thread="blockIdx.x"):
            for pair in T.thread_binding(pairs, thread="blockIdx.y"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    sums = T.alloc_buffer((block * stride,), "float32", scope="shared")
                    items = T.alloc_buffer((unit,), dtype, scope="local")
                    held = T.alloc_buffer((held_size,), held_dtype, scope="local")
                    factor = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((_OUTPUTS,), "float32", scope="local")
                    expert = T.alloc_buffer((1,), "int32", scope="local")
                    lane: T.let = thread % across
                    first: T.let = b * block + thread // across
                    expert[0] = chosen[pair // top_k, pair % top_k]
                    for r in T.unroll(_OUTPUTS):
                        total[r] = T.float32(0)
                    for i in T.serial((units + across - 1) // across):
                        u: T.let = i * across + lane
                        if u < units:
                            load_row(stored[0], items, pair // pairs_per_row, u * unit)
                            for r in T.unroll(_OUTPUTS):
                                o: T.let = T.min(first + r * deep, out_features - 1)
                                load_unit(stored[1], stored[2], held, factor, expert[0], o, u)
                                for k in T.unroll(unit):
                                    total[r] = total[r] + item(items, k, u * unit) * weight(
                                        held, factor, k
                                    )
                    for r in T.unroll(_OUTPUTS):
                        sums[(thread // across + r * deep) * stride + lane] = total[r]
                    T.tvm_storage_sync("shared")
                    if thread < block:
                        total[0] = T.float32(0)
                        for i in T.unroll(across):
                            total[0] = total[0] + sums[thread * stride + i]
                        if b * block + thread < out_features:
                            out[pair, b * block + thread] = T.Cast(dtype, total[0])

    return multiply_pairs


def _tile_steps(weights: ExpertWeights, pairs_per_row: int, dtype: str, load_bytes: int) -> Any:
    """Return a macro that launches the kernel: multiply(stored, order, plan, out, tiles).

    A block has a tile's pairs and some outputs. Inputs and weights go through shared memory, as
    float32 with the pairs, or the outputs, side by side.
    """
    unit, units, out_features = weights.unit, weights.num_units, weights.out_features
    (held_size, held_dtype), weight = weights.held, weights.value
    experts, (rows, columns) = weights.num_experts, _CORNER
    across = _COLUMNS // columns
    threads = across * (TILE // rows)
    assert threads == _COLUMNS
    steps = max(1, _DEPTH // unit)  # units at a time
    depth = steps * unit
    share = depth * TILE // threads  # inputs that a thread loads
    load_unit = weights.loader(load_bytes)
    load_row, item = _row_loader(share, depth, weights.in_features, dtype, load_bytes)

    @T.macro
    def fill(
        stored: T.meta_var,
        inputs: T.handle,
        outputs: T.handle,
        pair: T.handle,
        e: T.int32,
        start: T.int32,
        i: T.int32,
        thread: T.int32,
    ) -> None:
        """Bring the i-th `depth` inputs of pairs, and weights, into shared memory."""
        items = T.alloc_buffer((share,), dtype, scope="local")
        held = T.alloc_buffer((held_size,), held_dtype, scope="local")
        factor = T.alloc_buffer((1,), "float32", scope="local")
        row: T.let = thread % TILE
        part: T.let = thread // TILE * share
        load_row(stored[0], items, pair[row] // pairs_per_row, i * depth + part)
        for k in T.unroll(share):
            inputs[(part + k) * TILE + row] = item(items, k, i * depth + part)
        # A thread has all units of an output; past the end one comes again, and meets zeros.
        for s in T.unroll(steps):
            o: T.let = T.min(start + thread, out_features - 1)
            u: T.let = T.min(i * steps + s, units - 1)
            load_unit(stored[1], stored[2], held, factor, e, o, u)
            for k in T.unroll(unit):
                outputs[(s * unit + k) * _COLUMNS + thread] = weight(held, factor, k)

    @T.macro
    def multiply_tiles(
        stored: T.meta_var, order: T.handle, plan: T.handle, out: T.handle, tiles: T.int32
    ) -> None:
        for tile in T.thread_binding(tiles, thread="blockIdx.x"):
            for b in T.thread_binding(
                (out_features + _COLUMNS - 1) // _COLUMNS, thread="blockIdx.y"
            ):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    inputs = T.alloc_buffer((depth * TILE,), "float32", scope="shared")
                    outputs = T.alloc_buffer((depth * _COLUMNS,), "float32", scope="shared")
                    pair = T.alloc_buffer((TILE,), "int32", scope="shared")
                    total = T.alloc_buffer((rows * columns,), "float32", scope="local")
                    x = T.alloc_buffer((rows,), "float32", scope="local")
                    w = T.alloc_buffer((columns,), "float32", scope="local")
                    e: T.let = plan[experts + 1 + tile]
                    if e >= 0:
                        first: T.let = plan[e] + (tile - plan[e] // TILE - e) * TILE
                        end: T.let = plan[e + 1]
                        top: T.let = thread // across * rows
                        left: T.let = thread % across * columns
                        if thread < TILE:
                            pair[thread] = order[T.min(first + thread, end - 1)]
                        for r in T.unroll(rows * columns):
                            total[r] = T.float32(0)
                        T.tvm_storage_sync("shared")
                        for i in T.serial((units + steps - 1) // steps):
                            fill(stored, inputs, outputs, pair, e, b * _COLUMNS, i, thread)
                            T.tvm_storage_sync("shared")
                            for k in T.serial(depth):
                                for r in T.unroll(rows // 4):
                                    for v in T.vectorized(4):
                                        x[r * 4 + v] = inputs[k * TILE + top + r * 4 + v]
                                for v in T.vectorized(columns):
                                    w[v] = outputs[k * _COLUMNS + left + v]
                                for r in T.unroll(rows):
                                    for c in T.unroll(columns):
                                        total[r * columns + c] = (
                                            total[r * columns + c] + x[r] * w[c]
                                        )
                            T.tvm_storage_sync("shared")
                        for r in T.unroll(rows):
                            if first + top + r < end:
                                for c in T.unroll(columns):
                                    if b * _COLUMNS + left + c < out_features:
                                        out[pair[top + r], b * _COLUMNS + left + c] = T.Cast(
                                            dtype, total[r * columns + c]
                                        )

    return multiply_tiles
