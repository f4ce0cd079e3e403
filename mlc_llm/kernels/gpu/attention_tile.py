"""Attention of tiles of tokens: a block for some tokens of one sequence and a KV head.

Queries, and keys or values block by block, are in shared memory; each thread has some rows, and of
them some keys of the block or some items of the result. Blocks of keys begin at multiples of their
size, so that what a token sums does not depend on its tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu.attention_pages import first_key, is_visible
from mlc_llm.kernels.gpu.attention_scores import (
    MASKED,
    BlockLimits,
    finish_score,
    weight,
    with_sink,
)
from mlc_llm.kernels.gpu.int8_pages import token_scale

# Rows and keys of a block, the best first: those that fit in shared memory are taken.
_SIZES = ((64, 32), (32, 32), (32, 16), (32, 8), (16, 16), (16, 8), (8, 8), (4, 8))
_ACROSS = 8  # threads that share a row
_MAX_LOADS = 8  # vectors of a block that a thread loads: more do not fit in registers
_KEYS = 4  # whose weights a thread loads at once


@dataclass(frozen=True)
class TileGrid:
    """How a block is laid out: `rows` of queries, of which each thread has `row_step`, against
    `keys` at a time; `tokens` of `heads` heads each make up the rows, the last ones may be unused.
    """

    rows: int
    keys: int
    heads: int
    head_blocks: int
    lanes: int
    vectors: int  # of the result, that a thread has in each of its rows
    q_stride: int
    kv_stride: int

    @property
    def tokens(self) -> int:
        """Return the tokens of a tile."""
        return self.rows // self.heads

    @property
    def row_step(self) -> int:
        """Return the rows of a thread."""
        return 4 if self.vectors * self.lanes <= 16 else 2

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return self.rows // self.row_step * _ACROSS

    @property
    def score_stride(self) -> int:
        """Return the items from a row of scores to the next."""
        return self.keys + 4

    def shared_bytes(self, dtype: str, kv_dtype: str) -> int:
        """Return the shared memory of a block."""
        q_bytes, kv_bytes = (2 if name == "float16" else 4 for name in (dtype, kv_dtype))
        held = self.rows * self.q_stride * q_bytes + self.keys * self.kv_stride * kv_bytes
        return held + 4 * self.rows * (self.score_stride + _ACROSS)


def held_dtype(shape: AttentionShape, dtype: str) -> str:
    """Return what keys and values are in shared memory; dtype: of queries."""
    return dtype if shape.is_int8 else shape.kv_dtype


def tile_grid(shape: AttentionShape, dtype: str, limits: BlockLimits) -> TileGrid:
    """Return the layout for a shape: the largest that fits. Raises UnsupportedModel."""
    head_dim = shape.head_dim
    lanes = min(limits.lanes(name, head_dim) for name in (dtype, shape.kv_dtype))
    if head_dim % (lanes * _ACROSS):
        lanes = math.gcd(4, head_dim)
    vectors = -(-head_dim // (lanes * _ACROSS))
    fitting = []
    for rows, keys in _SIZES:
        head_blocks = -(-shape.group // rows)
        heads = -(-shape.group // head_blocks)
        kv_stride = max(head_dim, vectors * lanes * _ACROSS) + lanes
        grid = TileGrid(rows, keys, heads, head_blocks, lanes, vectors, head_dim + lanes, kv_stride)
        if grid.shared_bytes(dtype, held_dtype(shape, dtype)) <= limits.shared_bytes:
            fitting.append(grid)
    if not fitting:
        raise UnsupportedModel(
            f"its heads of {head_dim} items do not fit in the {limits.shared_bytes >> 10} KiB that "
            "threads of this kind of GPU share; compile it for another"
        )
    few_loads = (
        grid for grid in fitting if grid.keys * head_dim <= _MAX_LOADS * lanes * grid.threads
    )
    return next(few_loads, fitting[0])


def tile_steps(
    shape: AttentionShape, dtype: str, sink_dtype: str | None, limits: BlockLimits
) -> Any:
    """Return a macro that launches the kernel: attend(q, pages, query_start, page_table, positions,
    sink_logits, out, n, batch).
    """
    grid = tile_grid(shape, dtype, limits)
    group, kv_heads, head_dim = shape.group, shape.num_kv_heads, shape.head_dim
    page_size, held = shape.page_size, held_dtype(shape, dtype)
    rows, keys, heads, head_blocks = grid.rows, grid.keys, grid.heads, grid.head_blocks
    tokens, lanes, vectors, threads = grid.tokens, grid.lanes, grid.vectors, grid.threads
    q_stride, kv_stride, score_stride = grid.q_stride, grid.kv_stride, grid.score_stride
    row_step, key_step = grid.row_step, keys // _ACROSS
    deep, head_vectors = threads // _ACROSS, head_dim // lanes

    def block_at(index: Any, window_block: Any, sink_blocks: Any) -> Any:
        """Return the number of the index-th block that a tile needs."""
        if shape.sinks <= 0:
            return index + window_block
        return T.if_then_else(index < sink_blocks, index, index - sink_blocks + window_block)

    @T.macro
    def load(
        pages: T.handle,
        page_table: T.handle,
        block_items: T.handle,
        s: T.int32,
        side: T.meta_var,
        kv_head: T.int32,
        start: T.int32,
        last: T.int32,
        thread: T.int32,
    ) -> None:
        """Copy the items of a block of keys, or what codes stand for; those past the last repeat
        it.
        """
        for i in T.serial((keys * head_vectors + threads - 1) // threads):
            at: T.let = i * threads + thread
            key: T.let = T.min(start + at // head_vectors, last)
            if at < keys * head_vectors:
                place: T.let = at // head_vectors * kv_stride + at % head_vectors * lanes
                item: T.let = key % page_size * head_dim + at % head_vectors * lanes
                page: T.let = page_table[s, key // page_size]
                if shape.is_int8:
                    codes = T.alloc_buffer((lanes,), "int8", scope="local")
                    numbers = T.alloc_buffer((lanes,), held, scope="local")
                    scale = T.alloc_buffer((1,), "float32", scope="local")
                    scale[0] = token_scale(shape, pages, page, side, kv_head, key % page_size)
                    for v in T.vectorized(lanes):
                        codes[v] = pages[page, side, kv_head, item + v]
                    for v in T.unroll(lanes):
                        numbers[v] = T.Cast(held, T.Cast("float32", codes[v]) * scale[0])
                    for v in T.vectorized(lanes):
                        block_items[place + v] = numbers[v]
                else:
                    for v in T.vectorized(lanes):
                        block_items[place + v] = pages[page, side, kv_head, item + v]

    @T.macro
    def attend(
        q: T.handle,
        pages: T.handle,
        query_start: T.handle,
        page_table: T.handle,
        positions: T.handle,
        sink_logits: T.handle,
        out: T.handle,
        n: T.int32,
        batch: T.int32,
    ) -> None:
        for bx in T.thread_binding(n // tokens + batch, thread="blockIdx.x"):
            for by in T.thread_binding(kv_heads * head_blocks, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    queries = T.alloc_buffer((rows * q_stride,), dtype, scope="shared")
                    block_items = T.alloc_buffer((keys * kv_stride,), held, scope="shared")
                    powers = T.alloc_buffer((rows * score_stride,), "float32", scope="shared")
                    partial = T.alloc_buffer((rows * _ACROSS,), "float32", scope="shared")
                    q_items = T.alloc_buffer((row_step * lanes,), dtype, scope="local")
                    kv_items = T.alloc_buffer((key_step * lanes,), held, scope="local")
                    v_items = T.alloc_buffer((lanes,), held, scope="local")
                    score = T.alloc_buffer((row_step * key_step,), "float32", scope="local")
                    acc = T.alloc_buffer((row_step * vectors * lanes,), "float32", scope="local")
                    state = T.alloc_buffer((row_step * 2,), "float32", scope="local")
                    place = T.alloc_buffer((row_step,), "int32", scope="local")
                    best = T.alloc_buffer((2,), "float32", scope="local")
                    bound = T.alloc_buffer((2,), "int32", scope="local")
                    kept = T.alloc_buffer((5,), "int32", scope="local")
                    p_items = T.alloc_buffer((row_step * _KEYS,), "float32", scope="local")
                    o_items = T.alloc_buffer((lanes,), dtype, scope="local")
                    # The blocks of sequence s begin with number query_start[s] // tokens + s.
                    bound[0] = 0
                    bound[1] = batch - 1
                    for _step in T.serial(24):
                        if bound[0] < bound[1]:
                            middle: T.let = (bound[0] + bound[1] + 1) // 2
                            if query_start[middle] // tokens + middle <= bx:
                                bound[0] = middle
                            else:
                                bound[1] = middle - 1
                    s: T.let = bound[0]
                    # What is read from memory is not written out again at each use, as sums are.
                    kept[0] = query_start[s] + (bx - query_start[s] // tokens - s) * tokens
                    first: T.let = kept[0]
                    kept[1] = T.min(query_start[s + 1] - first, tokens)
                    count: T.let = kept[1]
                    kv_head: T.let = by // head_blocks
                    first_head: T.let = kv_head * group + by % head_blocks * heads
                    x: T.let = thread % _ACROSS
                    y: T.let = thread // _ACROSS
                    if count > 0:
                        last: T.let = positions[first + count - 1]
                        kept[2] = first_key(shape, positions[first]) // keys
                        window_block: T.let = kept[2]
                        kept[3] = T.min((shape.sinks + keys - 1) // keys, window_block)
                        sink_blocks: T.let = kept[3]
                        for i in T.serial((rows * head_vectors + threads - 1) // threads):
                            at: T.let = i * threads + thread
                            query_row: T.let = at // head_vectors
                            if at < rows * head_vectors:
                                for v in T.vectorized(lanes):
                                    queries[
                                        query_row * q_stride + at % head_vectors * lanes + v
                                    ] = q[
                                        first + T.min(query_row // heads, count - 1),
                                        T.min(first_head + query_row % heads, shape.num_heads - 1),
                                        at % head_vectors * lanes + v,
                                    ]
                        for i in T.unroll(row_step):
                            state[i * 2] = T.float32(MASKED)
                            state[i * 2 + 1] = T.float32(0)
                            place[i] = positions[first + T.min((i * deep + y) // heads, count - 1)]
                            for v in T.unroll(vectors * lanes):
                                acc[i * vectors * lanes + v] = T.float32(0)
                        for block in T.serial(sink_blocks + last // keys - window_block + 1):
                            kept[4] = block_at(block, window_block, sink_blocks) * keys
                            start: T.let = kept[4]
                            T.tvm_storage_sync("shared")
                            load(
                                *(pages, page_table, block_items, s, 0, kv_head),
                                *(start, last, thread),
                            )
                            T.tvm_storage_sync("shared")
                            for i in T.unroll(row_step * key_step):
                                score[i] = T.float32(0)
                            for d in T.serial(head_vectors):
                                for i in T.unroll(row_step):
                                    for v in T.vectorized(lanes):
                                        q_items[i * lanes + v] = queries[
                                            (i * deep + y) * q_stride + d * lanes + v
                                        ]
                                for j in T.unroll(key_step):
                                    for v in T.vectorized(lanes):
                                        kv_items[j * lanes + v] = block_items[
                                            (j * _ACROSS + x) * kv_stride + d * lanes + v
                                        ]
                                for i in T.unroll(row_step):
                                    for j in T.unroll(key_step):
                                        for v in T.unroll(lanes):
                                            score[i * key_step + j] = score[
                                                i * key_step + j
                                            ] + T.Cast("float32", q_items[i * lanes + v]) * T.Cast(
                                                "float32", kv_items[j * lanes + v]
                                            )
                            for i in T.unroll(row_step):
                                best[0] = T.float32(MASKED)
                                for j in T.unroll(key_step):
                                    key: T.let = start + j * _ACROSS + x
                                    score[i * key_step + j] = T.Select(
                                        is_visible(shape, key, place[i]),
                                        finish_score(
                                            shape,
                                            score[i * key_step + j],
                                            first_head + (i * deep + y) % heads,
                                            key,
                                            place[i],
                                        ),
                                        T.float32(MASKED),
                                    )
                                    best[0] = T.max(best[0], score[i * key_step + j])
                                partial[(i * deep + y) * _ACROSS + x] = best[0]
                            T.tvm_storage_sync("shared")
                            for i in T.unroll(row_step):
                                best[0] = state[i * 2]
                                for c in T.unroll(_ACROSS):
                                    best[0] = T.max(best[0], partial[(i * deep + y) * _ACROSS + c])
                                best[1] = T.exp2(state[i * 2] - best[0])
                                state[i * 2] = best[0]
                                state[i * 2 + 1] = state[i * 2 + 1] * best[1]
                                for v in T.unroll(vectors * lanes):
                                    acc[i * vectors * lanes + v] = (
                                        acc[i * vectors * lanes + v] * best[1]
                                    )
                                for j in T.unroll(key_step):
                                    best[1] = weight(score[i * key_step + j], best[0])
                                    state[i * 2 + 1] = state[i * 2 + 1] + best[1]
                                    powers[(i * deep + y) * score_stride + j * _ACROSS + x] = best[
                                        1
                                    ]
                            load(
                                *(pages, page_table, block_items, s, 1, kv_head),
                                *(start, last, thread),
                            )
                            T.tvm_storage_sync("shared")
                            for j in T.serial(keys // _KEYS):
                                for i in T.unroll(row_step):
                                    for v in T.vectorized(_KEYS):
                                        p_items[i * _KEYS + v] = powers[
                                            (i * deep + y) * score_stride + j * _KEYS + v
                                        ]
                                for u in T.unroll(_KEYS):
                                    for c in T.unroll(vectors):
                                        for v in T.vectorized(lanes):
                                            v_items[v] = block_items[
                                                (j * _KEYS + u) * kv_stride
                                                + (c * _ACROSS + x) * lanes
                                                + v
                                            ]
                                        for i in T.unroll(row_step):
                                            for v in T.unroll(lanes):
                                                acc[(i * vectors + c) * lanes + v] = acc[
                                                    (i * vectors + c) * lanes + v
                                                ] + p_items[i * _KEYS + u] * T.Cast(
                                                    "float32", v_items[v]
                                                )
                        T.tvm_storage_sync("shared")
                        for i in T.unroll(row_step):
                            partial[(i * deep + y) * _ACROSS + x] = state[i * 2 + 1]
                        T.tvm_storage_sync("shared")
                        for i in T.unroll(row_step):
                            row: T.let = i * deep + y
                            head: T.let = first_head + row % heads
                            best[0] = T.float32(0)
                            for c in T.unroll(_ACROSS):
                                best[0] = best[0] + partial[row * _ACROSS + c]
                            if (
                                row // heads < count
                                and by % head_blocks * heads + row % heads < group
                            ):
                                best[0] = T.float32(1) / with_sink(
                                    best[0], state[i * 2], sink_logits, head, sink_dtype
                                )
                                for c in T.unroll(vectors):
                                    if c * _ACROSS + x < head_vectors:
                                        for v in T.unroll(lanes):
                                            o_items[v] = T.Cast(
                                                dtype, acc[(i * vectors + c) * lanes + v] * best[0]
                                            )
                                        for v in T.vectorized(lanes):
                                            out[
                                                first + row // heads,
                                                head * head_dim + (c * _ACROSS + x) * lanes + v,
                                            ] = o_items[v]

    return attend
