"""Causal attention over paged keys and values (Dao et al. 2022, online softmax).

Knows the page layout written by `rope.py`. One task is one tile of query tokens of one sequence
with one KV head; all query heads that share the KV head are rows of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    LANES,
    MASKED,
    exp,
    reduce_max,
    reduce_sum,
    splat,
    vector_lanes,
)

# Keys per step of the online softmax; rows of queries per task (about).
KEY_BLOCK = 64
TILE_ROWS = 16


@dataclass(frozen=True)
class AttentionShape:
    """What the attention kernel is specialised for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    scale: float
    window: int  # tokens a query sees, itself included; -1 sees all
    sinks: int = 0  # first tokens that every query sees in spite of the window

    @property
    def group(self) -> int:
        """Return the number of query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_tokens(self) -> int:
        """Return the number of query tokens in a tile."""
        return max(1, TILE_ROWS // self.group)


def paged_attention(shape: AttentionShape) -> Any:
    """Attend: q (n, heads, head_dim) float32, pages, query_start (b + 1), page_table (b, p),
    context_len (b), positions (n), all int32 -> (n, heads * head_dim) float32.

    A token at position i sees keys max(0, i - window + 1) .. i of its own sequence, and with a
    window also the first `sinks` keys (Xiao et al. 2023, but at their true positions).
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    group, tile_tokens, page_size = shape.group, shape.tile_tokens, shape.page_size
    window, sinks, scale, kv_dtype = shape.window, shape.sinks, shape.scale, shape.kv_dtype
    rows = tile_tokens * group
    # Rows that share one load of keys or values; rows of a task are a multiple of the group.
    step = next(size for size in (4, 3, 2, 1) if group % size == 0)
    key_vectors = KEY_BLOCK // LANES
    value_lanes = vector_lanes(head_dim)
    vector, value_vector = f"float32x{LANES}", f"float32x{value_lanes}"
    assert page_size == LANES, "scores of one page are one vector"

    @T.macro
    def load_queries(
        q: T.handle, qs: T.handle, first: T.int32, count: T.int32, kv_head: T.int32
    ) -> None:
        for i in T.serial(count):
            for h in T.serial(group):
                for d in T.serial(head_dim):
                    qs[i * group + h, d] = q[first + i, kv_head * group + h, d] * T.float32(scale)

    @T.macro
    def score_block(
        qs: T.handle,
        pages: T.handle,
        page_table: T.handle,
        scores: T.handle,
        s: T.int32,
        kv_head: T.int32,
        start: T.int32,
        end: T.int32,
        num_rows: T.int32,
    ) -> None:
        dot = T.alloc_buffer((step, LANES), "float32")
        for u in T.serial(key_vectors):
            if start + u * LANES < end:
                for r in T.serial(num_rows // step):
                    for i in T.unroll(step):
                        dot[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
                    for d in T.serial(head_dim):
                        for i in T.unroll(step):
                            dot[i, T.ramp(0, 1, LANES)] = dot[i, T.ramp(0, 1, LANES)] + splat(
                                qs[r * step + i, d]
                            ) * T.Cast(
                                vector,
                                pages[
                                    page_table[s, start // page_size + u],
                                    0,
                                    kv_head,
                                    T.ramp(d * page_size, 1, LANES),
                                ],
                            )
                    for i in T.unroll(step):
                        scores[r * step + i, T.ramp(u * LANES, 1, LANES)] = dot[
                            i, T.ramp(0, 1, LANES)
                        ]

    @T.macro
    def mask_and_softmax(
        scores: T.handle,
        state: T.handle,
        acc: T.handle,
        row: T.int32,
        position: T.int32,
        start: T.int32,
    ) -> None:
        best = T.alloc_buffer((LANES,), "float32")
        best[T.ramp(0, 1, LANES)] = splat(T.float32(MASKED))
        for u in T.unroll(key_vectors):
            scores[row, T.ramp(u * LANES, 1, LANES)] = T.Select(
                _visible(T.ramp(start + u * LANES, 1, LANES), position, window, sinks),
                scores[row, T.ramp(u * LANES, 1, LANES)],
                splat(T.float32(MASKED)),
            )
            best[T.ramp(0, 1, LANES)] = T.max(
                best[T.ramp(0, 1, LANES)], scores[row, T.ramp(u * LANES, 1, LANES)]
            )
        # state: running maximum, running sum, factor for what was summed before.
        state[row, 2] = state[row, 0]
        state[row, 0] = T.max(state[row, 0], reduce_max(best[T.ramp(0, 1, LANES)]))
        best[T.ramp(0, 1, LANES)] = exp(splat(state[row, 2] - state[row, 0]))
        state[row, 2] = best[0]
        best[T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for u in T.unroll(key_vectors):
            scores[row, T.ramp(u * LANES, 1, LANES)] = T.Select(
                _visible(T.ramp(start + u * LANES, 1, LANES), position, window, sinks),
                exp(scores[row, T.ramp(u * LANES, 1, LANES)] - splat(state[row, 0])),
                splat(T.float32(0)),
            )
            best[T.ramp(0, 1, LANES)] = (
                best[T.ramp(0, 1, LANES)] + scores[row, T.ramp(u * LANES, 1, LANES)]
            )
        state[row, 1] = state[row, 1] * state[row, 2] + reduce_sum(best[T.ramp(0, 1, LANES)])
        for d in T.serial(head_dim // value_lanes):
            acc[row, T.ramp(d * value_lanes, 1, value_lanes)] = acc[
                row, T.ramp(d * value_lanes, 1, value_lanes)
            ] * splat(state[row, 2], value_lanes)

    @T.macro
    def add_values(
        pages: T.handle,
        page_table: T.handle,
        scores: T.handle,
        acc: T.handle,
        s: T.int32,
        kv_head: T.int32,
        start: T.int32,
        end: T.int32,
        num_rows: T.int32,
    ) -> None:
        part = T.alloc_buffer((step, value_lanes), "float32")
        for u in T.serial((T.min(KEY_BLOCK, end - start) + page_size - 1) // page_size):
            for d in T.serial(head_dim // value_lanes):
                for r in T.serial(num_rows // step):
                    for i in T.unroll(step):
                        part[i, T.ramp(0, 1, value_lanes)] = acc[
                            r * step + i, T.ramp(d * value_lanes, 1, value_lanes)
                        ]
                    for t in T.serial(T.min(page_size, end - start - u * page_size)):
                        for i in T.unroll(step):
                            part[i, T.ramp(0, 1, value_lanes)] = part[
                                i, T.ramp(0, 1, value_lanes)
                            ] + splat(
                                scores[r * step + i, u * page_size + t], value_lanes
                            ) * T.Cast(
                                value_vector,
                                pages[
                                    page_table[s, start // page_size + u],
                                    1,
                                    kv_head,
                                    T.ramp(t * head_dim + d * value_lanes, 1, value_lanes),
                                ],
                            )
                    for i in T.unroll(step):
                        acc[r * step + i, T.ramp(d * value_lanes, 1, value_lanes)] = part[
                            i, T.ramp(0, 1, value_lanes)
                        ]

    @T.macro
    def attend_tile(
        q: T.handle,
        pages: T.handle,
        page_table: T.handle,
        context_len: T.handle,
        positions: T.handle,
        out: T.handle,
        s: T.int32,
        kv_head: T.int32,
        first: T.int32,
        count: T.int32,
    ) -> None:
        qs = T.alloc_buffer((rows, head_dim), "float32")
        scores = T.alloc_buffer((rows, KEY_BLOCK), "float32")
        acc = T.alloc_buffer((rows, head_dim), "float32")
        state = T.alloc_buffer((rows, 3), "float32")
        span = T.alloc_buffer((2,), "int32")
        load_queries(q, qs, first, count, kv_head)
        for r in T.serial(count * group):
            state[r, 0] = T.float32(MASKED)
            state[r, 1] = T.float32(0)
            for d in T.serial(head_dim):
                acc[r, d] = T.float32(0)
        span[0] = 0
        if window > 0:
            span[0] = T.max(0, positions[first] - (window - 1)) // KEY_BLOCK
        span[1] = T.min(positions[first + count - 1] + 1, context_len[s])
        for block in T.serial((span[1] + KEY_BLOCK - 1) // KEY_BLOCK):
            if block >= span[0] or block * KEY_BLOCK < sinks:
                start = block * KEY_BLOCK
                score_block(
                    qs, pages, page_table, scores, s, kv_head, start, span[1], count * group
                )
                for r in T.serial(count * group):
                    mask_and_softmax(scores, state, acc, r, positions[first + r // group], start)
                add_values(
                    pages, page_table, scores, acc, s, kv_head, start, span[1], count * group
                )
        for r in T.serial(count * group):
            for d in T.serial(head_dim):
                out[first + r // group, (kv_head * group + r % group) * head_dim + d] = (
                    acc[r, d] / state[r, 1]
                )

    @T.prim_func(private=True, s_tir=True)
    def paged_attention_kernel(
        q_handle: T.handle,
        pages_handle: T.handle,
        query_start_handle: T.handle,
        page_table_handle: T.handle,
        context_len_handle: T.handle,
        positions_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        batch = T.int32()
        max_pages = T.int32()
        num_pages = T.int32()
        starts = T.int32()
        q = T.match_buffer(q_handle, (n, heads, head_dim), "float32")
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, page_size * head_dim), kv_dtype
        )
        query_start = T.match_buffer(query_start_handle, (starts,), "int32")
        page_table = T.match_buffer(page_table_handle, (batch, max_pages), "int32")
        context_len = T.match_buffer(context_len_handle, (batch,), "int32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, heads * head_dim), "float32")
        # At most one partly filled tile a sequence: some of these tasks find nothing to do.
        for task in T.parallel((n // tile_tokens + batch) * kv_heads):
            place = T.alloc_buffer((3,), "int32")  # sequence, first token, tiles left to skip
            place[0] = -1
            place[2] = task // kv_heads
            for s in T.serial(batch):
                if place[0] < 0:
                    if place[2] * tile_tokens < query_start[s + 1] - query_start[s]:
                        place[0] = s
                        place[1] = query_start[s] + place[2] * tile_tokens
                    else:
                        place[2] = (
                            place[2]
                            - (query_start[s + 1] - query_start[s] + tile_tokens - 1) // tile_tokens
                        )
            if place[0] >= 0:
                attend_tile(
                    q,
                    pages,
                    page_table,
                    context_len,
                    positions,
                    out,
                    place[0],
                    task % kv_heads,
                    place[1],
                    T.min(tile_tokens, query_start[place[0] + 1] - place[1]),
                )

    return paged_attention_kernel


def _visible(keys: Any, position: Any, window: int, sinks: int) -> Any:
    """Return a mask: which of 16 keys the query at `position` sees."""
    mask = keys <= splat(position)
    if window > 0:
        recent = keys > splat(position - window)
        mask = T.bitwise_and(mask, T.bitwise_or(recent, keys < splat(T.int32(sinks))))
    return mask
