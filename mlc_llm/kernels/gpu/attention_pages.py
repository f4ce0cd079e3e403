"""Pages of keys and values on GPUs: what writes them, what copies them, which keys a query sees.

A page holds K and V of a head as (page_size, head_dim) each, so that a token's item is contiguous.
Threads are bound by hand; knows no softmax.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape

# Threads of a block; every GPU has so many.
THREADS = 256


def rope_and_write(shape: AttentionShape, rotary_dim: int, is_interleaved: bool, dtype: str) -> Any:
    """Rotate q and k, write k and v into their slots.

    qkv (n, (heads + 2 * kv_heads) * head_dim) of dtype, table (n, rotary_dim) float32 of
    `rope.rope_table`, slots (n) int32, pages in place -> q (n, heads, head_dim) of dtype. The first
    rotary_dim items of a head are rotated, in pairs (i, i + rotary_dim / 2), or (2i, 2i + 1) if
    interleaved.
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    half, width = rotary_dim // 2, (heads + 2 * kv_heads) * head_dim
    page_items, kv_dtype, store = shape.page_items, shape.kv_dtype, _store_item(shape, dtype)
    apart = 1 if is_interleaved else half

    @T.prim_func(private=True, s_tir=True)
    def rope_and_write_kernel(
        qkv_handle: T.handle,
        table_handle: T.handle,
        slots_handle: T.handle,
        pages_handle: T.handle,
        q_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, num_pages = T.int32(), T.int32()
        qkv = T.match_buffer(qkv_handle, (n, width), dtype)
        table = T.match_buffer(table_handle, (n, rotary_dim), "float32")
        slots = T.match_buffer(slots_handle, (n,), "int32")
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
        q = T.match_buffer(q_handle, (n, heads, head_dim), dtype)
        for block in T.thread_binding((n * width + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                item = T.alloc_buffer((1,), "float32", scope="local")
                t: T.let = (block * THREADS + thread) // width
                c: T.let = (block * THREADS + thread) % width
                d: T.let = c % head_dim
                if t < n:
                    item[0] = T.Cast("float32", qkv[t, c])
                    if c < (heads + kv_heads) * head_dim and d < rotary_dim:
                        pair: T.let = d // 2 if is_interleaved else d % half
                        is_first: T.let = d % 2 == 0 if is_interleaved else d < half
                        item[0] = (
                            item[0] * table[t, pair]
                            + T.if_then_else(
                                is_first,
                                -T.Cast("float32", qkv[t, c + apart]),
                                T.Cast("float32", qkv[t, c - apart]),
                            )
                            * table[t, half + pair]
                        )
                    store(item, slots, pages, q, t, c)

    return rope_and_write_kernel


def write(shape: AttentionShape, dtype: str) -> Any:
    """Write k and v into their slots as they are: `rope_and_write` without a table."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    width, page_items = (heads + 2 * kv_heads) * head_dim, shape.page_items
    kv_dtype, store = shape.kv_dtype, _store_item(shape, dtype)

    @T.prim_func(private=True, s_tir=True)
    def write_kernel(
        qkv_handle: T.handle, slots_handle: T.handle, pages_handle: T.handle, q_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, num_pages = T.int32(), T.int32()
        qkv = T.match_buffer(qkv_handle, (n, width), dtype)
        slots = T.match_buffer(slots_handle, (n,), "int32")
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
        q = T.match_buffer(q_handle, (n, heads, head_dim), dtype)
        for block in T.thread_binding((n * width + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                item = T.alloc_buffer((1,), "float32", scope="local")
                t: T.let = (block * THREADS + thread) // width
                c: T.let = (block * THREADS + thread) % width
                if t < n:
                    item[0] = T.Cast("float32", qkv[t, c])
                    store(item, slots, pages, q, t, c)

    return write_kernel


def _store_item(shape: AttentionShape, dtype: str) -> Any:
    """Return a macro (item, slots, pages, q, t, c): put item c of token t where it belongs."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    page_size, kv_dtype = shape.page_size, shape.kv_dtype

    @T.macro
    def store(
        item: T.handle, slots: T.handle, pages: T.handle, q: T.handle, t: T.int32, c: T.int32
    ) -> None:
        if c < heads * head_dim:
            q[t, c // head_dim, c % head_dim] = T.Cast(dtype, item[0])
        else:
            # Heads of K, then those of V.
            h: T.let = (c - heads * head_dim) // head_dim
            pages[
                slots[t] // page_size,
                h // kv_heads,
                h % kv_heads,
                slots[t] % page_size * head_dim + c % head_dim,
            ] = T.Cast(kv_dtype, item[0])

    return store


def copy_pages(kv_heads: int, page_items: int, kv_dtype: str) -> Any:
    """Copy whole pages: pages (num_pages, 2, kv_heads, page_items) in place, sources (m),
    targets (m) int32. No page is both a source and a target.
    """
    size = 2 * kv_heads * page_items

    @T.prim_func(private=True, s_tir=True)
    def copy_pages_kernel(
        pages_handle: T.handle, sources_handle: T.handle, targets_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        num_pages, m = T.int32(), T.int32()
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
        sources = T.match_buffer(sources_handle, (m,), "int32")
        targets = T.match_buffer(targets_handle, (m,), "int32")
        for block in T.thread_binding((m * size + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                i: T.let = (block * THREADS + thread) // size
                c: T.let = (block * THREADS + thread) % size
                side: T.let = c // (kv_heads * page_items)
                h: T.let = c // page_items % kv_heads
                if i < m:
                    pages[targets[i], side, h, c % page_items] = pages[
                        sources[i], side, h, c % page_items
                    ]

    return copy_pages_kernel


def first_key(shape: AttentionShape, position: Any) -> Any:
    """Return the first key in the window of a query at `position`, sinks left aside."""
    if shape.window <= 0:
        return T.int32(0)
    return T.max(shape.first_key(position), 0)


def is_visible(shape: AttentionShape, key: Any, position: Any) -> Any:
    """Return whether a query at `position` sees a key."""
    if shape.window <= 0:
        return key <= position
    recent = key >= shape.first_key(position)
    if shape.sinks > 0:
        recent = T.Or(recent, key < shape.sinks)
    return T.And(key <= position, recent)
