"""Causal attention over paged keys and values: how tokens and keys are dealt out to threads.

The arithmetic is in `attention_block.py`, the page layout in `attention_pages.py`.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_block import block_steps
from mlc_llm.kernels.cpu.attention_pages import KEY_BLOCK, KEY_VECTORS, AttentionShape, page_steps
from mlc_llm.kernels.cpu.attention_window import first_block, is_needed, needs_mask
from mlc_llm.kernels.cpu.vector_math import LANES, reduce_sum, splat

__all__ = ["AttentionShape", "paged_attention"]

# Rows of queries in a tile of several tokens (about): enough to pay for copying a key block.
TILE_ROWS = 48
# Keys that are summed from one maximum on. Parts are merged in order, so that a token of a tile
# gets the same sum as one whose parts are dealt out to threads.
PART_KEYS = 512


def paged_attention(shape: AttentionShape, sink_dtype: str | None = None) -> Any:
    """Attend: q (n, heads, head_dim) float32, pages, query_start (b + 1), page_table (b, p),
    context_len (b), positions (n), all int32[, sink_logits (heads) of sink_dtype]
    -> (n, heads * head_dim) float32.

    Every sequence brings at least one token. A token at position i sees keys
    max(0, i - window + 1) .. i of its own sequence, from the last multiple of the window on if it
    is chunked, and with a window also the first `sinks` keys (Xiao et al. 2023, but at their true
    positions). What else is in the step changes no bit. A head's sink logit is one more score in
    its softmax, of no value (OpenAI 2025, gpt-oss model card).
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    group = shape.group
    tile_tokens = max(1, TILE_ROWS // group)
    kv_dtype, page_items = shape.kv_dtype, shape.page_items
    # Tiles work on copies of their blocks, single tokens on the pages.
    tile_pages, single_pages = page_steps(shape, is_copied=True), page_steps(shape, is_copied=False)
    tile_steps = block_steps(
        shape,
        tile_pages,
        shape.row_step(tile_tokens),
        is_fetching=False,
        has_sink_logits=sink_dtype is not None,
    )
    single_steps = block_steps(
        shape,
        single_pages,
        shape.row_step(1),
        is_fetching=True,
        has_sink_logits=sink_dtype is not None,
    )
    tile_rows, single_rows = shape.padded_rows(tile_tokens), shape.padded_rows(1)

    @T.macro
    def aim(
        page_table: T.handle,
        context_len: T.handle,
        places: T.handle,
        s: T.int32,
        kv_head: T.int32,
        start: T.int32,
        batch: T.int32,
        is_tile: T.meta_var,
    ) -> None:
        """Have the block at `start` fetched or, past the end, what the thread needs after that."""
        ahead = T.alloc_buffer((2,), "int32")  # sequence, first key
        ahead[0] = s
        ahead[1] = start
        places[2 * KEY_VECTORS] = kv_head
        if start >= context_len[s]:
            if not is_tile:
                places[2 * KEY_VECTORS] = (kv_head + 1) % kv_heads
                if kv_head + 1 == kv_heads:
                    ahead[0] = T.min(s + 1, batch - 1)
            ahead[1] = first_block(context_len[ahead[0]] - 1, shape)
        tile_pages.find(page_table, places, KEY_VECTORS, ahead[0], ahead[1], context_len[ahead[0]])

    @T.macro
    def attend(
        queries: T.handle,
        pages: T.handle,
        page_table: T.handle,
        positions: T.handle,
        context_len: T.handle,
        acc: T.handle,
        state: T.handle,
        s: T.int32,
        kv_head: T.int32,
        first: T.int32,
        count: T.int32,
        begin: T.int32,
        end: T.int32,
        batch: T.int32,
        is_tile: T.meta_var,
    ) -> None:
        """Sum `count` tokens from row `first` over the keys begin .. end, at most a part."""
        reading = T.meta_var(tile_pages if is_tile else single_pages)
        steps = T.meta_var(tile_steps if is_tile else single_steps)
        max_rows = T.meta_var(tile_rows if is_tile else single_rows)
        sums = T.alloc_buffer((max_rows, LANES), "float32")
        scores = T.alloc_buffer((max_rows, KEY_BLOCK), "float32")
        copy = T.alloc_buffer((KEY_BLOCK * head_dim,), "float32")
        factors = T.alloc_buffer((2, KEY_BLOCK), "float32")
        places = T.alloc_buffer((2 * KEY_VECTORS + 1,), "int32")
        source = T.meta_var(copy if is_tile else pages)
        for r in T.serial(max_rows):
            steps.clear(acc, state, r)
            sums[r, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for block in T.serial((end - begin + KEY_BLOCK - 1) // KEY_BLOCK):
            start = begin + block * KEY_BLOCK
            if is_needed(start, KEY_BLOCK, positions[first], shape):
                reading.find(page_table, places, 0, s, start, end)
                aim(
                    *(page_table, context_len, places),
                    *(s, kv_head, start + KEY_BLOCK, batch, is_tile),
                )
                reading.load_factors(pages, places, factors, kv_head)
                if is_tile:
                    reading.load_keys(pages, copy, places, kv_head)
                steps.score(queries, source, places, factors, scores, kv_head, count * group)
                if shape.alibi:
                    for r in T.serial(count * group):
                        steps.lower(
                            *(scores, r, kv_head * group + r % group),
                            *(positions[first + r // group], start),
                        )
                if needs_mask(start, positions[first], positions[first + count - 1], shape):
                    for r in T.serial(count * group):
                        steps.mask(scores, r, positions[first + r // group], start)
                for r in T.serial(count * group):
                    steps.raise_maximum(scores, state, sums, acc, r)
                for r in T.serial(count * group):
                    steps.weigh(scores, factors, state, sums, r)
                if is_tile:
                    reading.load_values(pages, copy, places, kv_head)
                steps.add_values(
                    *(scores, source, places, acc, kv_head, count * group),
                    T.min(KEY_BLOCK, end - start),
                )
        for r in T.serial(count * group):
            state[r, 1] = reduce_sum(sums[r, T.ramp(0, 1, LANES)])

    @T.macro
    def attend_tile(
        q: T.handle,
        pages: T.handle,
        query_start: T.handle,
        page_table: T.handle,
        positions: T.handle,
        context_len: T.handle,
        sink_logits: T.handle,
        out: T.handle,
        batch: T.int32,
        tile: T.int32,
        kv_head: T.int32,
    ) -> None:
        """One tile of tokens of one sequence, or one token, all its keys."""
        place = T.alloc_buffer((4,), "int32")  # sequence, first token, tiles left to skip, keys
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
            queries = T.alloc_buffer((tile_rows, head_dim), "float32")
            part = T.alloc_buffer((tile_rows, head_dim), "float32")
            part_state = T.alloc_buffer((tile_rows, 2), "float32")
            acc = T.alloc_buffer((tile_rows, head_dim), "float32")
            state = T.alloc_buffer((tile_rows, 2), "float32")
            count = T.min(tile_tokens, query_start[place[0] + 1] - place[1])
            place[3] = positions[place[1] + count - 1] + 1
            tile_steps.load_queries(q, queries, kv_head, place[1], count, tile_rows)
            if place[3] > PART_KEYS:
                for r in T.serial(count * group):
                    tile_steps.clear(acc, state, r)
            for p in T.serial(_parts(place[3])):
                if is_needed(p * PART_KEYS, PART_KEYS, positions[place[1]], shape):
                    operands = T.meta_var(
                        (
                            *(queries, pages, page_table, positions, context_len, part),
                            *(part_state, place[0], kv_head, place[1], count, p * PART_KEYS),
                            *(T.min((p + 1) * PART_KEYS, place[3]), batch),
                        )
                    )
                    if count == 1:
                        attend(*operands, False)
                    else:
                        attend(*operands, True)
                    if place[3] > PART_KEYS:
                        for r in T.serial(count * group):
                            tile_steps.merge(part, part_state, r, acc, state, r)
            for r in T.serial(count * group):
                target = T.meta_var((out, place[1] + r // group, kv_head * group + r % group))
                if place[3] > PART_KEYS:
                    tile_steps.store(acc, state, r, sink_logits, *target)
                else:
                    tile_steps.store(part, part_state, r, sink_logits, *target)

    @T.macro
    def attend_part(
        q: T.handle,
        pages: T.handle,
        page_table: T.handle,
        positions: T.handle,
        context_len: T.handle,
        parts: T.handle,
        part_states: T.handle,
        sink_logits: T.handle,
        out: T.handle,
        s: T.int32,
        kv_head: T.int32,
        p: T.int32,
        max_parts: T.int32,
        batch: T.int32,
    ) -> None:
        """The one token of sequence s over one part of its keys."""
        if p * PART_KEYS < context_len[s]:
            if is_needed(p * PART_KEYS, PART_KEYS, positions[s], shape):
                queries = T.alloc_buffer((single_rows, head_dim), "float32")
                acc = T.alloc_buffer((single_rows, head_dim), "float32")
                state = T.alloc_buffer((single_rows, 2), "float32")
                single_steps.load_queries(q, queries, kv_head, s, 1, single_rows)
                attend(
                    *(queries, pages, page_table, positions, context_len, acc, state),
                    *(s, kv_head, s, 1),
                    p * PART_KEYS,
                    T.min((p + 1) * PART_KEYS, context_len[s]),
                    *(batch, False),
                )
                for r in T.serial(group):
                    if context_len[s] > PART_KEYS:
                        row = (s * heads + kv_head * group + r) * max_parts + p
                        for i in T.serial(2):
                            part_states[row, i] = state[r, i]
                        for d in T.serial(head_dim):
                            parts[row, d] = acc[r, d]
                    else:
                        single_steps.store(acc, state, r, sink_logits, out, s, kv_head * group + r)

    @T.macro
    def merge_parts(
        positions: T.handle,
        context_len: T.handle,
        parts: T.handle,
        part_states: T.handle,
        sink_logits: T.handle,
        out: T.handle,
        s: T.int32,
        h: T.int32,
        max_parts: T.int32,
    ) -> None:
        if context_len[s] > PART_KEYS:
            acc = T.alloc_buffer((1, head_dim), "float32")
            state = T.alloc_buffer((1, 2), "float32")
            single_steps.clear(acc, state, 0)
            for p in T.serial(_parts(context_len[s])):
                if is_needed(p * PART_KEYS, PART_KEYS, positions[s], shape):
                    single_steps.merge(
                        parts, part_states, (s * heads + h) * max_parts + p, acc, state, 0
                    )
            single_steps.store(acc, state, 0, sink_logits, out, s, h)

    @T.macro
    def attend_all(
        q: T.handle,
        pages: T.handle,
        query_start: T.handle,
        page_table: T.handle,
        context_len: T.handle,
        positions: T.handle,
        sink_logits: T.handle,
        out: T.handle,
        n: T.int32,
        batch: T.int32,
        max_pages: T.int32,
    ) -> None:
        if n == batch:
            max_parts = T.meta_var(_parts(max_pages * LANES))
            parts = T.alloc_buffer((batch * heads * max_parts, head_dim), "float32")
            part_states = T.alloc_buffer((batch * heads * max_parts, 2), "float32")
            for task in T.parallel(kv_heads * batch * max_parts):
                attend_part(
                    *(q, pages, page_table, positions, context_len, parts, part_states),
                    *(sink_logits, out),
                    task // (kv_heads * max_parts),
                    task // max_parts % kv_heads,
                    task % max_parts,
                    *(max_parts, batch),
                )
            if max_parts > 1:
                for task in T.parallel(batch * heads):
                    merge_parts(
                        *(positions, context_len, parts, part_states, sink_logits, out),
                        *(task // heads, task % heads, max_parts),
                    )
        else:
            # At most one partly filled tile a sequence: some tasks find nothing to do. Early and
            # late tiles alternate, since late ones see more keys and threads get equal ranges.
            for task in T.parallel(kv_heads * (n // tile_tokens + batch)):
                attend_tile(
                    *(q, pages, query_start, page_table, positions, context_len),
                    *(sink_logits, out, batch),
                    _alternate(task % (n // tile_tokens + batch), n // tile_tokens + batch),
                    task // (n // tile_tokens + batch),
                )

    if sink_dtype is not None:

        @T.prim_func(private=True, s_tir=True)
        def sink_attention_kernel(
            q_handle: T.handle,
            pages_handle: T.handle,
            query_start_handle: T.handle,
            page_table_handle: T.handle,
            context_len_handle: T.handle,
            positions_handle: T.handle,
            sink_logits: T.Buffer((heads,), sink_dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n, batch, max_pages = T.int32(), T.int32(), T.int32()
            num_pages, starts = T.int32(), T.int32()
            q = T.match_buffer(q_handle, (n, heads, head_dim), "float32")
            pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
            query_start = T.match_buffer(query_start_handle, (starts,), "int32")
            page_table = T.match_buffer(page_table_handle, (batch, max_pages), "int32")
            context_len = T.match_buffer(context_len_handle, (batch,), "int32")
            positions = T.match_buffer(positions_handle, (n,), "int32")
            out = T.match_buffer(out_handle, (n, heads * head_dim), "float32")
            attend_all(
                *(q, pages, query_start, page_table, context_len, positions, sink_logits, out),
                *(n, batch, max_pages),
            )

        return sink_attention_kernel

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
        n, batch, max_pages = T.int32(), T.int32(), T.int32()
        num_pages, starts = T.int32(), T.int32()
        q = T.match_buffer(q_handle, (n, heads, head_dim), "float32")
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
        query_start = T.match_buffer(query_start_handle, (starts,), "int32")
        page_table = T.match_buffer(page_table_handle, (batch, max_pages), "int32")
        context_len = T.match_buffer(context_len_handle, (batch,), "int32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, heads * head_dim), "float32")
        attend_all(
            *(q, pages, query_start, page_table, context_len, positions, q, out),
            *(n, batch, max_pages),
        )

    return paged_attention_kernel


def _alternate(index: Any, count: Any) -> Any:
    """Return 0, count - 1, 1, count - 2, ... for index 0, 1, 2, 3, ..."""
    return T.if_then_else(index % 2 == 0, index // 2, count - 1 - index // 2)


def _parts(num_keys: Any) -> Any:
    """Return how many parts so many keys have."""
    return (num_keys + PART_KEYS - 1) // PART_KEYS
