"""Rotary embedding (Su et al. 2021, half-split form) and the write of K and V into pages.

A page holds K transposed, (head_dim, page_size), so that scores of 16 tokens are one vector, and
V as (page_size, head_dim). Page tensors are (num_pages, 2, kv_heads, page_size * head_dim).
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


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


def rope_and_write(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    page_size: int,
    kv_dtype: str,
) -> Any:
    """Rotate q and k, write k and v into their slots.

    qkv (n, (heads + 2 * kv_heads) * head_dim) float32, table (n, rotary_dim), slots (n) int32,
    pages (num_pages, 2, kv_heads, page_size * head_dim) in place -> q (n, heads, head_dim).
    """
    half = rotary_dim // 2
    width = (num_heads + 2 * num_kv_heads) * head_dim
    k_start = num_heads * head_dim
    v_start = (num_heads + num_kv_heads) * head_dim

    @T.macro
    def rotate_q(qkv: T.handle, table: T.handle, q: T.handle, t: T.int32, h: T.int32) -> None:
        for i in T.serial(half):
            q[t, h, i] = (
                qkv[t, h * head_dim + i] * table[t, i]
                - qkv[t, h * head_dim + half + i] * table[t, half + i]
            )
            q[t, h, half + i] = (
                qkv[t, h * head_dim + half + i] * table[t, i]
                + qkv[t, h * head_dim + i] * table[t, half + i]
            )
        for i in T.serial(head_dim - rotary_dim):
            q[t, h, rotary_dim + i] = qkv[t, h * head_dim + rotary_dim + i]

    @T.macro
    def write_kv(
        qkv: T.handle, table: T.handle, pages: T.handle, t: T.int32, h: T.int32, slot: T.int32
    ) -> None:
        page = slot // page_size
        offset = slot % page_size
        base = k_start + h * head_dim
        for i in T.serial(half):
            pages[page, 0, h, i * page_size + offset] = T.Cast(
                kv_dtype,
                qkv[t, base + i] * table[t, i] - qkv[t, base + half + i] * table[t, half + i],
            )
            pages[page, 0, h, (half + i) * page_size + offset] = T.Cast(
                kv_dtype,
                qkv[t, base + half + i] * table[t, i] + qkv[t, base + i] * table[t, half + i],
            )
        for i in T.serial(head_dim - rotary_dim):
            pages[page, 0, h, (rotary_dim + i) * page_size + offset] = T.Cast(
                kv_dtype, qkv[t, base + rotary_dim + i]
            )
        for i in T.serial(head_dim):
            pages[page, 1, h, offset * head_dim + i] = T.Cast(
                kv_dtype, qkv[t, v_start + h * head_dim + i]
            )

    @T.macro
    def one_token(
        qkv: T.handle, table: T.handle, slots: T.handle, pages: T.handle, q: T.handle, t: T.int32
    ) -> None:
        for h in T.serial(num_heads):
            rotate_q(qkv, table, q, t, h)
        for h in T.serial(num_kv_heads):
            write_kv(qkv, table, pages, t, h, slots[t])

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
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, num_kv_heads, page_size * head_dim), kv_dtype
        )
        q = T.match_buffer(q_handle, (n, num_heads, head_dim), "float32")
        if n < 4:
            for t in T.serial(n):
                one_token(qkv, table, slots, pages, q, t)
        else:
            for t in T.parallel(n):
                one_token(qkv, table, slots, pages, q, t)

    return rope_and_write_kernel
