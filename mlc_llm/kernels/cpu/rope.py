"""Rotary embedding (Su et al. 2021, half-split form) and the write of K and V into pages.

A page holds K transposed, (head_dim, page_size), so that scores of 16 tokens are one vector, and
V as (page_size, head_dim); int8 pages hold the float32 scales of their tokens after the codes.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.cpu.vector_math import multiply_add


def rope_table(rotary_dim: int, scale: float) -> Any:
    """Tabulate angles: positions (n) int32, inverse frequencies (rotary_dim / 2) float32
    -> (n, rotary_dim) float32, cosines then sines, each times `scale`.
    """
    half = rotary_dim // 2

    @T.prim_func(private=True, s_tir=True)
    def rope_table_kernel(
        positions_handle: T.handle, frequency_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        positions = T.match_buffer(positions_handle, (n,), "int32")
        frequency = T.match_buffer(frequency_handle, (half,), "float32")
        out = T.match_buffer(out_handle, (n, rotary_dim), "float32")
        for t in T.serial(n):
            for i in T.serial(half):
                out[t, i] = T.cos(T.Cast("float32", positions[t]) * frequency[i]) * T.float32(scale)
                out[t, half + i] = T.sin(
                    T.Cast("float32", positions[t]) * frequency[i]
                ) * T.float32(scale)

    return rope_table_kernel


def rotate(heads: tuple[int, int, int], rotary_dim: int, is_interleaved: bool = False) -> Any:
    """Rotate: x (n, (turned + kept) * head_dim) float32, table (n, rotary_dim) -> as x.

    heads: those that are turned, as `rope_and_write` does, those that are kept, and their size.
    """
    turned, kept, head_dim = heads
    width = (turned + kept) * head_dim
    rotate_head = _rotation(head_dim, rotary_dim, is_interleaved)

    @T.macro
    def one_token(x: T.handle, table: T.handle, out: T.handle, t: T.int32) -> None:
        row = T.alloc_buffer((head_dim,), "float32")
        for h in T.serial(turned):
            rotate_head(x, table, row, t, h * head_dim)
            for i in T.serial(head_dim):
                out[t, h * head_dim + i] = row[i]
        for i in T.serial(kept * head_dim):
            out[t, turned * head_dim + i] = x[t, turned * head_dim + i]

    @T.prim_func(private=True, s_tir=True)
    def rotate_kernel(x_handle: T.handle, table_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        table = T.match_buffer(table_handle, (n, rotary_dim), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < 4:
            for t in T.serial(n):
                one_token(x, table, out, t)
        else:
            for t in T.parallel(n):
                one_token(x, table, out, t)

    return rotate_kernel


def rope_and_write(shape: AttentionShape, rotary_dim: int, is_interleaved: bool = False) -> Any:
    """Rotate q and k, write k and v into their slots.

    qkv (n, (heads + 2 * kv_heads) * head_dim) float32, table (n, rotary_dim), slots (n) int32,
    pages (see `KVCacheLayout`) in place -> q (n, heads, head_dim). The first rotary_dim dimensions
    are rotated, in pairs (i, i + rotary_dim / 2), or (2i, 2i + 1) if interleaved. int8 pages get
    codes of max|x| / 127 over the head, and that scale.
    """
    num_kv_heads, page_items, kv_dtype = shape.num_kv_heads, shape.page_items, shape.kv_dtype
    num_heads, head_dim = shape.num_heads, shape.head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    one_token = _write_token(shape, _rotation(head_dim, rotary_dim, is_interleaved))

    @T.prim_func(private=True, s_tir=True)
    def rope_and_write_kernel(
        qkv_handle: T.handle,
        table_handle: T.handle,
        slots_handle: T.handle,
        pages_handle: T.handle,
        q_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        num_pages = T.int32()
        qkv = T.match_buffer(qkv_handle, (n, width), "float32")
        table = T.match_buffer(table_handle, (n, rotary_dim), "float32")
        slots = T.match_buffer(slots_handle, (n,), "int32")
        pages = T.match_buffer(pages_handle, (num_pages, 2, num_kv_heads, page_items), kv_dtype)
        q = T.match_buffer(q_handle, (n, num_heads, head_dim), "float32")
        if n < 4:
            for t in T.serial(n):
                one_token(qkv, table, slots, pages, q, t)
        else:
            for t in T.parallel(n):
                one_token(qkv, table, slots, pages, q, t)

    return rope_and_write_kernel


def write(shape: AttentionShape) -> Any:
    """Write k and v into their slots as they are: `rope_and_write` without a table."""
    num_kv_heads, page_items, kv_dtype = shape.num_kv_heads, shape.page_items, shape.kv_dtype
    num_heads, head_dim = shape.num_heads, shape.head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    one_token = _write_token(shape, _rotation(head_dim, 0, False))

    @T.prim_func(private=True, s_tir=True)
    def write_kernel(
        qkv_handle: T.handle, slots_handle: T.handle, pages_handle: T.handle, q_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        num_pages = T.int32()
        qkv = T.match_buffer(qkv_handle, (n, width), "float32")
        slots = T.match_buffer(slots_handle, (n,), "int32")
        pages = T.match_buffer(pages_handle, (num_pages, 2, num_kv_heads, page_items), kv_dtype)
        q = T.match_buffer(q_handle, (n, num_heads, head_dim), "float32")
        if n < 4:
            for t in T.serial(n):
                one_token(qkv, qkv, slots, pages, q, t)
        else:
            for t in T.parallel(n):
                one_token(qkv, qkv, slots, pages, q, t)

    return write_kernel


def _rotation(head_dim: int, rotary_dim: int, is_interleaved: bool) -> Any:
    """Return a macro (qkv, table, row, t, base): row = the rotated head that starts at `base`."""
    half = rotary_dim // 2
    # Where pair i has its members.
    step, apart = (2, 1) if is_interleaved else (1, half)

    @T.macro
    def rotate(qkv: T.handle, table: T.handle, row: T.handle, t: T.int32, base: T.int32) -> None:
        for i in T.serial(half):
            row[i * step] = multiply_add(
                -qkv[t, base + i * step + apart],
                table[t, half + i],
                qkv[t, base + i * step] * table[t, i],
                1,
            )
            row[i * step + apart] = multiply_add(
                qkv[t, base + i * step],
                table[t, half + i],
                qkv[t, base + i * step + apart] * table[t, i],
                1,
            )
        for i in T.serial(head_dim - rotary_dim):
            row[rotary_dim + i] = qkv[t, base + rotary_dim + i]

    return rotate


def _write_token(shape: AttentionShape, rotate: Any) -> Any:
    """Return a macro (qkv, table, slots, pages, q, t) for one token."""
    num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    page_size, kv_dtype, is_int8 = shape.page_size, shape.kv_dtype, shape.is_int8
    k_start = num_heads * head_dim
    v_start = (num_heads + num_kv_heads) * head_dim

    @T.macro
    def write(
        row: T.handle,
        pages: T.handle,
        slot: T.int32,
        side: T.int32,
        h: T.int32,
        token_step: T.meta_var,
        item_step: T.meta_var,
    ) -> None:
        """Store a row at item i * item_step + token * token_step of its page."""
        factor = T.alloc_buffer((2,), "float32")
        factor[1] = T.float32(1)
        if is_int8:
            factor[0] = T.float32(0)
            for i in T.serial(head_dim):
                factor[0] = T.max(factor[0], T.abs(row[i]))
            factor[1] = T.Select(factor[0] > T.float32(0), T.float32(127) / factor[0], T.float32(0))
            for byte in T.serial(4):
                pages[
                    slot // page_size,
                    side,
                    h,
                    page_size * head_dim + slot % page_size * 4 + byte,
                ] = T.Cast(
                    "int8",
                    T.shift_right(T.reinterpret("int32", factor[0] * T.float32(1 / 127)), 8 * byte),
                )
        for i in T.serial(head_dim):
            pages[slot // page_size, side, h, i * item_step + slot % page_size * token_step] = (
                T.Cast(kv_dtype, T.nearbyint(row[i] * factor[1]) if is_int8 else row[i])
            )

    @T.macro
    def one_token(
        qkv: T.handle, table: T.handle, slots: T.handle, pages: T.handle, q: T.handle, t: T.int32
    ) -> None:
        row = T.alloc_buffer((head_dim,), "float32")
        for h in T.serial(num_heads):
            rotate(qkv, table, row, t, h * head_dim)
            for i in T.serial(head_dim):
                q[t, h, i] = row[i]
        for h in T.serial(num_kv_heads):
            rotate(qkv, table, row, t, k_start + h * head_dim)
            write(row, pages, slots[t], 0, h, 1, page_size)
            for i in T.serial(head_dim):
                row[i] = qkv[t, v_start + h * head_dim + i]
            write(row, pages, slots[t], 1, h, head_dim, 1)

    return one_token
