"""Causal attention over paged keys and values: how tokens and keys are dealt out to threads.

Knows the page layout written by `rope.py`; the arithmetic is in `attention_block.py`.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_block import KEY_BLOCK, AttentionShape, block_steps
from mlc_llm.kernels.cpu.vector_math import LANES, MASKED, exp, reduce_sum, splat

__all__ = ["AttentionShape", "paged_attention"]

# Rows of queries in a tile of several tokens (about): enough to pay for converting a key block.
TILE_ROWS = 32
# Keys of a part when single tokens attend: long contexts are dealt out in such parts.
SPLIT_KEYS = 512


def paged_attention(shape: AttentionShape) -> Any:
    """Attend: q (n, heads, head_dim) float32, pages, query_start (b + 1), page_table (b, p),
    context_len (b), positions (n), all int32 -> (n, heads * head_dim) float32.

    Every sequence brings at least one token. A token at position i sees keys
    max(0, i - window + 1) .. i of its own sequence, and with a window also the first `sinks`
    keys (Xiao et al. 2023, but at their true positions).
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    group, window, sinks = shape.group, shape.window, shape.sinks
    tile_tokens = max(1, TILE_ROWS // group)
    tile_rows, single_rows = shape.padded_rows(tile_tokens), shape.padded_rows(1)
    scale, kv_dtype, page_items = shape.scale, shape.kv_dtype, shape.page_items
    steps = block_steps(shape)

    @T.macro
    def attend(
        q: T.handle,
        pages: T.handle,
        page_table: T.handle,
        positions: T.handle,
        acc: T.handle,
        sums: T.handle,
        state: T.handle,
        s: T.int32,
        kv_head: T.int32,
        first: T.int32,
        count: T.int32,
        begin: T.int32,
        end: T.int32,
        max_rows: T.meta_var,
    ) -> None:
        """Sum `count` tokens from row `first` over the keys begin .. end; begin is a block's."""
        qs = T.alloc_buffer((max_rows, head_dim), "float32")
        scores = T.alloc_buffer((max_rows, KEY_BLOCK), "float32")
        keys = T.alloc_buffer((head_dim, KEY_BLOCK), "float32")
        values = T.alloc_buffer((KEY_BLOCK, head_dim), "float32")
        factors = T.alloc_buffer((2, KEY_BLOCK), "float32")
        for r in T.serial(max_rows):
            state[r, 0] = T.float32(MASKED)
            sums[r, T.ramp(0, 1, LANES)] = splat(T.float32(0))
            for d in T.serial(head_dim):
                acc[r, d] = T.float32(0)
                qs[r, d] = T.float32(0)
        for r in T.serial(count * group):
            for d in T.serial(head_dim):
                qs[r, d] = q[first + r // group, kv_head * group + r % group, d] * T.float32(scale)
        for block in T.serial((end - begin + KEY_BLOCK - 1) // KEY_BLOCK):
            start = begin + block * KEY_BLOCK
            if _is_needed(start, positions[first], window, sinks):
                steps.load(pages, page_table, keys, values, factors, s, kv_head, start, end)
                steps.score(qs, keys, factors, scores, count * group)
                if _needs_mask(start, positions[first], positions[first + count - 1], window):
                    for r in T.serial(count * group):
                        steps.mask(scores, r, positions[first + r // group], start)
                for r in T.serial(count * group):
                    steps.softmax(scores, state, sums, acc, r)
                steps.add_values(
                    scores, values, factors, acc, count * group, T.min(KEY_BLOCK, end - start)
                )

    @T.macro
    def attend_tile(
        q: T.handle,
        pages: T.handle,
        query_start: T.handle,
        page_table: T.handle,
        positions: T.handle,
        out: T.handle,
        batch: T.int32,
        tile: T.int32,
        kv_head: T.int32,
    ) -> None:
        """One tile of tokens of one sequence, all its keys."""
        place = T.alloc_buffer((3,), "int32")  # sequence, first token, tiles left to skip
        place[0] = -1
        place[2] = tile
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
            acc = T.alloc_buffer((tile_rows, head_dim), "float32")
            sums = T.alloc_buffer((tile_rows, LANES), "float32")
            state = T.alloc_buffer((tile_rows, 2), "float32")
            count = T.min(tile_tokens, query_start[place[0] + 1] - place[1])
            attend(
                q,
                pages,
                page_table,
                positions,
                acc,
                sums,
                state,
                place[0],
                kv_head,
                place[1],
                count,
                0,
                positions[place[1] + count - 1] + 1,
                tile_rows,
            )
            for r in T.serial(count * group):
                state[r, 1] = T.float32(1) / reduce_sum(sums[r, T.ramp(0, 1, LANES)])
                for d in T.serial(head_dim):
                    out[place[1] + r // group, (kv_head * group + r % group) * head_dim + d] = (
                        acc[r, d] * state[r, 1]
                    )

    @T.macro
    def attend_part(
        q: T.handle,
        pages: T.handle,
        page_table: T.handle,
        positions: T.handle,
        context_len: T.handle,
        partial: T.handle,
        weight: T.handle,
        s: T.int32,
        kv_head: T.int32,
        part: T.int32,
    ) -> None:
        """One token of sequence s over one part of its keys, left unnormalised."""
        if part * SPLIT_KEYS < context_len[s]:
            acc = T.alloc_buffer((single_rows, head_dim), "float32")
            sums = T.alloc_buffer((single_rows, LANES), "float32")
            state = T.alloc_buffer((single_rows, 2), "float32")
            attend(
                q,
                pages,
                page_table,
                positions,
                acc,
                sums,
                state,
                s,
                kv_head,
                s,
                1,
                part * SPLIT_KEYS,
                T.min((part + 1) * SPLIT_KEYS, context_len[s]),
                single_rows,
            )
            for r in T.serial(group):
                weight[s, kv_head * group + r, part, 0] = state[r, 0]
                weight[s, kv_head * group + r, part, 1] = reduce_sum(sums[r, T.ramp(0, 1, LANES)])
                for d in T.serial(head_dim):
                    partial[s, kv_head * group + r, part, d] = acc[r, d]

    @T.macro
    def merge_parts(
        partial: T.handle,
        weight: T.handle,
        out: T.handle,
        s: T.int32,
        h: T.int32,
        num_parts: T.int32,
    ) -> None:
        best = T.alloc_buffer((LANES,), "float32")
        total = T.alloc_buffer((1,), "float32")
        best[0] = T.float32(MASKED)
        for part in T.serial(num_parts):
            best[0] = T.max(best[0], weight[s, h, part, 0])
        total[0] = T.float32(0)
        for part in T.serial(num_parts):
            weight[s, h, part, 0] = T.Shuffle([exp(splat(weight[s, h, part, 0] - best[0]))], [0])
            total[0] = total[0] + weight[s, h, part, 0] * weight[s, h, part, 1]
        for d in T.serial(head_dim):
            out[s, h * head_dim + d] = T.float32(0)
        for part in T.serial(num_parts):
            for d in T.serial(head_dim):
                out[s, h * head_dim + d] = out[s, h * head_dim + d] + partial[s, h, part, d] * (
                    weight[s, h, part, 0] / total[0]
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
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
        query_start = T.match_buffer(query_start_handle, (starts,), "int32")
        page_table = T.match_buffer(page_table_handle, (batch, max_pages), "int32")
        context_len = T.match_buffer(context_len_handle, (batch,), "int32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, heads * head_dim), "float32")
        if n == batch:
            partial = T.alloc_buffer((batch, heads, _parts(max_pages), head_dim), "float32")
            weight = T.alloc_buffer((batch, heads, _parts(max_pages), 2), "float32")
            for task in T.parallel(batch * kv_heads * _parts(max_pages)):
                attend_part(
                    q,
                    pages,
                    page_table,
                    positions,
                    context_len,
                    partial,
                    weight,
                    task // (kv_heads * _parts(max_pages)),
                    task // _parts(max_pages) % kv_heads,
                    task % _parts(max_pages),
                )
            for s in T.serial(batch):
                for h in T.serial(heads):
                    merge_parts(
                        partial,
                        weight,
                        out,
                        s,
                        h,
                        (context_len[s] + SPLIT_KEYS - 1) // SPLIT_KEYS,
                    )
        else:
            # At most one partly filled tile a sequence: some tasks find nothing to do. Early and
            # late tiles alternate, since late ones see more keys and threads get equal ranges.
            for task in T.parallel(kv_heads * (n // tile_tokens + batch)):
                attend_tile(
                    q,
                    pages,
                    query_start,
                    page_table,
                    positions,
                    out,
                    batch,
                    _alternate(task % (n // tile_tokens + batch), n // tile_tokens + batch),
                    task // (n // tile_tokens + batch),
                )

    return paged_attention_kernel


def _alternate(index: Any, count: Any) -> Any:
    """Return 0, count - 1, 1, count - 2, ... for index 0, 1, 2, 3, ..."""
    return T.if_then_else(index % 2 == 0, index // 2, count - 1 - index // 2)


def _parts(max_pages: Any) -> Any:
    """Return how many parts the longest context has."""
    return (max_pages * LANES + SPLIT_KEYS - 1) // SPLIT_KEYS


def _is_needed(start: Any, position: Any, window: int, sinks: int) -> Any:
    """Return whether a block has keys that some query from `position` on sees."""
    if window <= 0:
        return T.bool(True)
    return T.Or(start + KEY_BLOCK > position - window + 1, start < sinks)


def _needs_mask(start: Any, first: Any, last: Any, window: int) -> Any:
    """Return whether a query of positions first .. last does not see all keys of a block."""
    above = start + KEY_BLOCK - 1 > first
    return above if window <= 0 else T.Or(above, start <= last - window)
