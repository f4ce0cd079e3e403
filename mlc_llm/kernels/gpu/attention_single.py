"""Attention of sequences that bring one token each: a block for a part of the keys of a KV head.

Threads of a block are a grid: some share a key, each with a vector of its items, and so many keys
are read at a time. The heads of a group share what is read. Parts are merged afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu.attention_pages import first_key
from mlc_llm.kernels.gpu.attention_scores import (
    MASKED,
    BlockLimits,
    finish_score,
    weight,
    with_sink,
)
from mlc_llm.kernels.gpu.int8_pages import token_scale

# Rows of queries that a block works on at most: more do not fit in registers.
_MAX_ROWS = 8
# Keys that are worth a part of their own.
_PART_KEYS = 128


@dataclass(frozen=True)
class SingleGrid:
    """How a block is laid out: `rows` heads, `across` threads of `lanes` items each for a key,
    `deep` keys at a time, `steps` times without a barrier.
    """

    rows: int
    row_blocks: int
    lanes: int
    across: int
    deep: int
    steps: int

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return self.across * self.deep

    @property
    def keys(self) -> int:
        """Return the keys between two barriers."""
        return self.deep * self.steps

    @property
    def part_keys(self) -> int:
        """Return the keys of the smallest part."""
        return -(-_PART_KEYS // self.keys) * self.keys


def single_grid(shape: AttentionShape, limits: BlockLimits) -> SingleGrid:
    """Return the layout for a shape."""
    row_blocks = -(-shape.group // _MAX_ROWS)
    rows = -(-shape.group // row_blocks)
    lanes = limits.lanes(shape.kv_dtype, shape.head_dim)
    if rows > 4 and lanes > 4:
        lanes = 4
    across = shape.head_dim // lanes
    deep = max(1, limits.threads // across)
    steps = 4
    while steps > 1 and 4 * rows * deep * steps * (across + 1) > limits.shared_bytes * 2 // 3:
        steps //= 2
    return SingleGrid(rows, row_blocks, lanes, across, deep, steps)


def scratch_width(shape: AttentionShape) -> int:
    """Return the items of a part's result: its sum of values, its maximum, its sum of powers."""
    return shape.head_dim + 2


def single_steps(
    shape: AttentionShape, dtype: str, sink_dtype: str | None, limits: BlockLimits
) -> tuple[Any, Any]:
    """Return macros that launch the two kernels.

    attend(q, pages, page_table, positions, sink_logits, scratch, out, batch, parts) and
    merge(positions, sink_logits, scratch, out, batch, parts). parts: how many the longest sequence
    may have. scratch (b, heads, max_parts, head_dim + 2) float32.
    """
    grid = single_grid(shape, limits)
    group, heads, kv_heads = shape.group, shape.num_heads, shape.num_kv_heads
    head_dim, page_size, kv_dtype = shape.head_dim, shape.page_size, shape.kv_dtype
    rows, row_blocks, lanes = grid.rows, grid.row_blocks, grid.lanes
    across, deep, steps, threads, keys = (
        *(grid.across, grid.deep, grid.steps, grid.threads, grid.keys),
    )
    work_items = max(rows * keys * (across + 1), deep * head_dim)

    def key_at(j: Any, position: Any) -> Any:
        """Return the j-th key that a query sees."""
        if shape.window <= 0 or shape.sinks <= 0:
            return first_key(shape, position) + j
        start = first_key(shape, position)
        return T.if_then_else(j < T.min(start, shape.sinks), j, j + T.max(start - shape.sinks, 0))

    def num_seen(position: Any) -> Any:
        """Return how many keys a query sees."""
        start = first_key(shape, position)
        return position + 1 - start + T.min(start, shape.sinks)

    def part_len(seen: Any) -> Any:
        """Return the keys of each part: it depends on nothing but the query."""
        even = (seen + limits.max_parts - 1) // limits.max_parts
        return T.max((even + keys - 1) // keys * keys, grid.part_keys)

    @T.macro
    def find(
        page_table: T.handle,
        page_of: T.handle,
        s: T.int32,
        start: T.int32,
        end: T.int32,
        y: T.int32,
        position: T.int32,
    ) -> None:
        """Note the page of each step; the keys begin at `start`."""
        for u in T.unroll(steps):
            # What is past the end repeats the last key and has no weight.
            page_of[u] = page_table[
                s, key_at(T.min(start + u * deep + y, end - 1), position) // page_size
            ]

    @T.macro
    def attend(
        q: T.handle,
        pages: T.handle,
        page_table: T.handle,
        positions: T.handle,
        sink_logits: T.handle,
        scratch: T.handle,
        out: T.handle,
        batch: T.int32,
        parts: T.meta_var,
    ) -> None:
        for s in T.thread_binding(batch, thread="blockIdx.x"):
            for by in T.thread_binding(kv_heads * row_blocks * parts, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    work = T.alloc_buffer((work_items,), "float32", scope="shared")
                    scores = T.alloc_buffer((rows * keys,), "float32", scope="shared")
                    states = T.alloc_buffer((rows * deep * 2,), "float32", scope="shared")
                    query = T.alloc_buffer((rows * lanes,), "float32", scope="local")
                    acc = T.alloc_buffer((rows * lanes,), "float32", scope="local")
                    state = T.alloc_buffer((rows * 2,), "float32", scope="local")
                    k_items = T.alloc_buffer((steps * lanes,), kv_dtype, scope="local")
                    v_items = T.alloc_buffer((steps * lanes,), kv_dtype, scope="local")
                    # Of keys and values that are codes.
                    scales = T.alloc_buffer((2 * steps,), "float32", scope="local")
                    dot = T.alloc_buffer((2,), "float32", scope="local")
                    # What is read from memory is not written out again at each use, as sums are.
                    kept = T.alloc_buffer((3,), "int32", scope="local")
                    page_of = T.alloc_buffer((steps,), "int32", scope="local")
                    part: T.let = by // (kv_heads * row_blocks)
                    kv_head: T.let = by // row_blocks % kv_heads
                    first_row: T.let = by % row_blocks * rows
                    first_head: T.let = kv_head * group + first_row
                    x: T.let = thread % across
                    y: T.let = thread // across
                    position: T.let = positions[s]
                    kept[0] = part_len(num_seen(position))
                    length: T.let = kept[0]
                    kept[1] = part * length
                    begin: T.let = kept[1]
                    kept[2] = T.min(begin + length, num_seen(position))
                    end: T.let = kept[2]
                    is_whole: T.let = length >= num_seen(position)
                    if begin < end:
                        for r in T.unroll(rows):
                            state[r * 2] = T.float32(MASKED)
                            state[r * 2 + 1] = T.float32(0)
                            for v in T.unroll(lanes):
                                acc[r * lanes + v] = T.float32(0)
                                query[r * lanes + v] = T.Cast(
                                    "float32",
                                    q[s, T.min(first_head + r, heads - 1), x * lanes + v],
                                )
                        find(page_table, page_of, s, begin, end, y, position)
                        for block in T.serial((end - begin + keys - 1) // keys):
                            start: T.let = begin + block * keys
                            for u in T.unroll(steps):
                                page: T.let = page_of[u]
                                key: T.let = key_at(T.min(start + u * deep + y, end - 1), position)
                                vector: T.let = key % page_size * across + x
                                for v in T.vectorized(lanes):
                                    k_items[u * lanes + v] = pages[
                                        page, 0, kv_head, vector * lanes + v
                                    ]
                                for v in T.vectorized(lanes):
                                    v_items[u * lanes + v] = pages[
                                        page, 1, kv_head, vector * lanes + v
                                    ]
                                if shape.is_int8:
                                    for side in T.unroll(2):
                                        scales[side * steps + u] = token_scale(
                                            shape, pages, page, side, kv_head, key % page_size
                                        )
                            find(page_table, page_of, s, start + keys, end, y, position)
                            for r in T.unroll(rows):
                                for u in T.unroll(steps):
                                    dot[0] = T.float32(0)
                                    for v in T.unroll(lanes):
                                        dot[0] = dot[0] + query[r * lanes + v] * T.Cast(
                                            "float32", k_items[u * lanes + v]
                                        )
                                    if shape.is_int8:
                                        dot[0] = dot[0] * scales[u]
                                    work[(r * keys + u * deep + y) * (across + 1) + x] = dot[0]
                            T.tvm_storage_sync("shared")
                            for i in T.unroll((rows * keys + threads - 1) // threads):
                                at: T.let = i * threads + thread
                                if at < rows * keys:
                                    dot[0] = T.float32(0)
                                    for c in T.unroll(across):
                                        dot[0] = dot[0] + work[at * (across + 1) + c]
                                    j: T.let = start + at % keys
                                    scores[at] = T.if_then_else(
                                        j < end,
                                        finish_score(
                                            shape,
                                            dot[0],
                                            first_head + at // keys,
                                            key_at(j, position),
                                            position,
                                        ),
                                        T.float32(MASKED),
                                    )
                            T.tvm_storage_sync("shared")
                            for r in T.unroll(rows):
                                dot[0] = state[r * 2]
                                for u in T.unroll(steps):
                                    dot[0] = T.max(dot[0], scores[r * keys + u * deep + y])
                                dot[1] = T.exp2(state[r * 2] - dot[0])
                                state[r * 2] = dot[0]
                                state[r * 2 + 1] = state[r * 2 + 1] * dot[1]
                                for v in T.unroll(lanes):
                                    acc[r * lanes + v] = acc[r * lanes + v] * dot[1]
                                for u in T.unroll(steps):
                                    dot[1] = weight(scores[r * keys + u * deep + y], dot[0])
                                    state[r * 2 + 1] = state[r * 2 + 1] + dot[1]
                                    if shape.is_int8:
                                        dot[1] = dot[1] * scales[steps + u]
                                    for v in T.unroll(lanes):
                                        acc[r * lanes + v] = acc[r * lanes + v] + dot[1] * T.Cast(
                                            "float32", v_items[u * lanes + v]
                                        )
                        # Keys at different depths have sums of their own: join them.
                        if x == 0:
                            for r in T.unroll(rows):
                                states[(r * deep + y) * 2] = state[r * 2]
                                states[(r * deep + y) * 2 + 1] = state[r * 2 + 1]
                        T.tvm_storage_sync("shared")
                        for r in T.unroll(rows):
                            dot[0] = T.float32(MASKED)
                            for c in T.unroll(deep):
                                dot[0] = T.max(dot[0], states[(r * deep + c) * 2])
                            dot[1] = T.exp2(state[r * 2] - dot[0])
                            for v in T.unroll(lanes):
                                work[y * head_dim + x * lanes + v] = acc[r * lanes + v] * dot[1]
                            dot[1] = T.float32(0)
                            for c in T.unroll(deep):
                                dot[1] = dot[1] + states[(r * deep + c) * 2 + 1] * T.exp2(
                                    states[(r * deep + c) * 2] - dot[0]
                                )
                            T.tvm_storage_sync("shared")
                            head: T.let = first_head + r
                            if first_row + r < group:
                                for i in T.unroll((head_dim + threads - 1) // threads):
                                    d: T.let = i * threads + thread
                                    if d < head_dim:
                                        state[0] = T.float32(0)
                                        for c in T.unroll(deep):
                                            state[0] = state[0] + work[c * head_dim + d]
                                        if is_whole:
                                            out[s, head * head_dim + d] = T.Cast(
                                                dtype,
                                                state[0]
                                                / with_sink(
                                                    dot[1], dot[0], sink_logits, head, sink_dtype
                                                ),
                                            )
                                        else:
                                            scratch[s, head, part, d] = state[0]
                                if not is_whole and thread == 0:
                                    scratch[s, head, part, head_dim] = dot[0]
                                    scratch[s, head, part, head_dim + 1] = dot[1]
                            T.tvm_storage_sync("shared")

    max_parts = limits.max_parts
    merge_threads = min(limits.threads, -(-head_dim // 32) * 32)

    @T.macro
    def merge(
        positions: T.handle,
        sink_logits: T.handle,
        scratch: T.handle,
        out: T.handle,
        batch: T.int32,
    ) -> None:
        for s in T.thread_binding(batch, thread="blockIdx.x"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for thread in T.thread_binding(merge_threads, thread="threadIdx.x"):
                    states = T.alloc_buffer((2 * max_parts,), "float32", scope="shared")
                    best = T.alloc_buffer((3,), "float32", scope="local")
                    seen: T.let = num_seen(positions[s])
                    length: T.let = part_len(seen)
                    if seen > length:
                        for i in T.unroll((max_parts + merge_threads - 1) // merge_threads):
                            p: T.let = i * merge_threads + thread
                            if p < max_parts:
                                states[2 * p] = T.float32(MASKED)
                                states[2 * p + 1] = T.float32(0)
                                if p * length < seen:
                                    states[2 * p] = scratch[s, head, p, head_dim]
                                    states[2 * p + 1] = scratch[s, head, p, head_dim + 1]
                        T.tvm_storage_sync("shared")
                        best[0] = T.float32(MASKED)
                        for p in T.unroll(max_parts):
                            best[0] = T.max(best[0], states[2 * p])
                        best[1] = T.float32(0)
                        for p in T.unroll(max_parts):
                            best[1] = best[1] + states[2 * p + 1] * T.exp2(states[2 * p] - best[0])
                        best[1] = with_sink(best[1], best[0], sink_logits, head, sink_dtype)
                        for i in T.unroll((head_dim + merge_threads - 1) // merge_threads):
                            d: T.let = i * merge_threads + thread
                            if d < head_dim:
                                best[2] = T.float32(0)
                                for p in T.unroll(max_parts):
                                    if p * length < seen:
                                        best[2] = best[2] + scratch[s, head, p, d] * T.exp2(
                                            states[2 * p] - best[0]
                                        )
                                out[s, head * head_dim + d] = T.Cast(dtype, best[2] / best[1])

    return attend, merge
