"""Pages of int8 codes on GPUs: what writes them, and what a token's scale is.

A page of a head holds the codes of K or V as (page_size, head_dim), then the float32 scales of its
tokens, a byte an item. Threads are bound by hand; knows no softmax.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape

_MAX_THREADS = 256


def rope_and_write(shape: AttentionShape, rotary_dim: int, is_interleaved: bool, dtype: str) -> Any:
    """Rotate q and k, round k and v to codes and write them: `attention_pages.rope_and_write`."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    width, page_items = (heads + 2 * kv_heads) * head_dim, shape.page_items
    half, apart = rotary_dim // 2, 1 if is_interleaved else rotary_dim // 2

    @T.macro
    def item_of(
        qkv: T.handle, table: T.handle, row: T.handle, i: T.int32, t: T.int32, c: T.int32
    ) -> None:
        d: T.let = c % head_dim
        row[i] = T.Cast("float32", qkv[t, c])
        if c < (heads + kv_heads) * head_dim and d < rotary_dim:
            pair: T.let = d // 2 if is_interleaved else d % half
            is_first: T.let = d % 2 == 0 if is_interleaved else d < half
            row[i] = (
                row[i] * table[t, pair]
                + T.if_then_else(
                    is_first,
                    -T.Cast("float32", qkv[t, c + apart]),
                    T.Cast("float32", qkv[t, c - apart]),
                )
                * table[t, half + pair]
            )

    store = _store_heads(shape, dtype, item_of)

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
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), "int8")
        q = T.match_buffer(q_handle, (n, heads, head_dim), dtype)
        store(qkv, table, slots, pages, q, n)

    return rope_and_write_kernel


def write(shape: AttentionShape, dtype: str) -> Any:
    """Round k and v to codes and write them: `rope_and_write` without a table."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    width, page_items = (heads + 2 * kv_heads) * head_dim, shape.page_items

    @T.macro
    def item_of(
        qkv: T.handle, table: T.handle, row: T.handle, i: T.int32, t: T.int32, c: T.int32
    ) -> None:
        row[i] = T.Cast("float32", qkv[t, c])

    store = _store_heads(shape, dtype, item_of)

    @T.prim_func(private=True, s_tir=True)
    def write_kernel(
        qkv_handle: T.handle, slots_handle: T.handle, pages_handle: T.handle, q_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, num_pages = T.int32(), T.int32()
        qkv = T.match_buffer(qkv_handle, (n, width), dtype)
        slots = T.match_buffer(slots_handle, (n,), "int32")
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), "int8")
        q = T.match_buffer(q_handle, (n, heads, head_dim), dtype)
        store(qkv, qkv, slots, pages, q, n)

    return write_kernel


def _store_heads(shape: AttentionShape, dtype: str, item_of: Any) -> Any:
    """Return a macro (qkv, table, slots, pages, q, n): a block puts a head of a token in its place.

    item_of(qkv, table, row, i, t, c): row[i] becomes item c of token t.
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    page_size, all_heads = shape.page_size, heads + 2 * kv_heads
    threads = min(1 << (head_dim - 1).bit_length(), _MAX_THREADS)
    items, halvings = -(-head_dim // threads), threads.bit_length() - 1

    @T.macro
    def store(
        qkv: T.handle, table: T.handle, slots: T.handle, pages: T.handle, q: T.handle, n: T.int32
    ) -> None:
        for block in T.thread_binding(n * all_heads, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                row = T.alloc_buffer((items,), "float32", scope="local")
                factor = T.alloc_buffer((1,), "float32", scope="local")
                largest = T.alloc_buffer((threads,), "float32", scope="shared")
                t: T.let = block // all_heads
                head: T.let = block % all_heads
                factor[0] = T.float32(0)
                for i in T.unroll(items):
                    if i * threads + thread < head_dim:
                        item_of(qkv, table, row, i, t, head * head_dim + i * threads + thread)
                        factor[0] = T.max(factor[0], T.abs(row[i]))
                largest[thread] = factor[0]
                for step in T.unroll(halvings):
                    T.tvm_storage_sync("shared")
                    if thread < threads >> (step + 1):
                        largest[thread] = T.max(
                            largest[thread], largest[thread + (threads >> (step + 1))]
                        )
                T.tvm_storage_sync("shared")
                if head < heads:
                    for i in T.unroll(items):
                        if i * threads + thread < head_dim:
                            q[t, head, i * threads + thread] = T.Cast(dtype, row[i])
                else:
                    slot: T.let = slots[t]
                    side: T.let = (head - heads) // kv_heads  # heads of K, then those of V
                    h: T.let = (head - heads) % kv_heads
                    factor[0] = T.Select(
                        largest[0] > T.float32(0), T.float32(127) / largest[0], T.float32(0)
                    )
                    for i in T.unroll(items):
                        if i * threads + thread < head_dim:
                            pages[
                                slot // page_size,
                                side,
                                h,
                                slot % page_size * head_dim + i * threads + thread,
                            ] = T.Cast("int8", T.floor(row[i] * factor[0] + T.float32(0.5)))
                    if thread < 4:
                        pages[
                            slot // page_size,
                            side,
                            h,
                            page_size * head_dim + slot % page_size * 4 + thread,
                        ] = T.Cast(
                            "int8",
                            T.shift_right(
                                T.reinterpret("int32", largest[0] * T.float32(1 / 127)), 8 * thread
                            ),
                        )

    return store


def token_scale(
    shape: AttentionShape, pages: Any, page: Any, side: Any, kv_head: Any, place: Any
) -> Any:
    """Return what the codes of a token are multiplied with; place: its number in the page."""
    first = shape.page_size * shape.head_dim + place * 4
    return T.reinterpret("float32", pages[page, side, kv_head, T.ramp(first, 1, 4)])
