"""Causal attention over paged keys and values: which of the two schedules a step takes.

Steps of single tokens are in `attention_single.py`, all others in `attention_tile.py` or, on tensor
cores, in `attention_tensor.py`.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu.attention_scores import BlockLimits
from mlc_llm.kernels.gpu.attention_single import scratch_width, single_grid, single_steps
from mlc_llm.kernels.gpu.attention_tensor import fits_tensor_cores, tensor_steps
from mlc_llm.kernels.gpu.attention_tile import tile_steps
from mlc_llm.kernels.gpu.tensor_cores import TensorCores


def paged_attention(
    shape: AttentionShape,
    dtype: str,
    sink_dtype: str | None,
    limits: BlockLimits,
    cores: TensorCores | None = None,
) -> Any:
    """Attend: q (n, heads, head_dim) of dtype, pages, query_start (b + 1), page_table (b, p),
    positions (n), all int32[, sink_logits (heads) of sink_dtype]
    -> scratch (b, heads, parts, head_dim + 2) float32, and (n, heads * head_dim) of dtype.

    Which keys a token sees is said in `kernels.cpu.attention`. Every sequence brings at least one
    token. What else is in the step changes no bit of a token, beside that a step of single tokens
    sums in another order than all others. Arithmetic is float32; on tensor cores, if the GPU has
    `cores` and the shape suits them, weights are rounded to float16.
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    kv_dtype, page_items, page_size = shape.kv_dtype, shape.page_items, shape.page_size
    max_parts, width = limits.max_parts, scratch_width(shape)
    part_keys = single_grid(shape, limits).part_keys
    attend_single, merge = single_steps(shape, dtype, sink_dtype, limits)
    if cores is not None and fits_tensor_cores(shape, dtype, cores):
        attend_tile = tensor_steps(shape, dtype, sink_dtype, cores)
    else:
        attend_tile = tile_steps(shape, dtype, sink_dtype, limits)

    @T.macro
    def attend_all(
        q: T.handle,
        pages: T.handle,
        query_start: T.handle,
        page_table: T.handle,
        positions: T.handle,
        sink_logits: T.handle,
        scratch: T.handle,
        out: T.handle,
        n: T.int32,
        batch: T.int32,
        max_pages: T.int32,
    ) -> None:
        parts = T.meta_var(T.min((max_pages * page_size + part_keys - 1) // part_keys, max_parts))
        if n == batch:
            attend_single(
                *(q, pages, page_table, positions, sink_logits, scratch, out, batch, parts)
            )
            if max_pages * page_size > part_keys:
                merge(positions, sink_logits, scratch, out, batch)
        else:
            attend_tile(*(q, pages, query_start, page_table, positions, sink_logits, out, n, batch))

    if sink_dtype is not None:

        @T.prim_func(private=True, s_tir=True)
        def sink_attention_kernel(
            q_handle: T.handle,
            pages_handle: T.handle,
            query_start_handle: T.handle,
            page_table_handle: T.handle,
            positions_handle: T.handle,
            sink_logits: T.Buffer((heads,), sink_dtype),
            scratch_handle: T.handle,
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            n, batch, max_pages = T.int32(), T.int32(), T.int32()
            num_pages, starts = T.int32(), T.int32()
            q = T.match_buffer(q_handle, (n, heads, head_dim), dtype)
            pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
            query_start = T.match_buffer(query_start_handle, (starts,), "int32")
            page_table = T.match_buffer(page_table_handle, (batch, max_pages), "int32")
            positions = T.match_buffer(positions_handle, (n,), "int32")
            scratch = T.match_buffer(scratch_handle, (batch, heads, max_parts, width), "float32")
            out = T.match_buffer(out_handle, (n, heads * head_dim), dtype)
            attend_all(
                *(q, pages, query_start, page_table, positions, sink_logits, scratch, out),
                *(n, batch, max_pages),
            )

        return sink_attention_kernel

    @T.prim_func(private=True, s_tir=True)
    def paged_attention_kernel(
        q_handle: T.handle,
        pages_handle: T.handle,
        query_start_handle: T.handle,
        page_table_handle: T.handle,
        positions_handle: T.handle,
        scratch_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, max_pages = T.int32(), T.int32(), T.int32()
        num_pages, starts = T.int32(), T.int32()
        q = T.match_buffer(q_handle, (n, heads, head_dim), dtype)
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, page_items), kv_dtype)
        query_start = T.match_buffer(query_start_handle, (starts,), "int32")
        page_table = T.match_buffer(page_table_handle, (batch, max_pages), "int32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        scratch = T.match_buffer(scratch_handle, (batch, heads, max_parts, width), "float32")
        out = T.match_buffer(out_handle, (n, heads * head_dim), dtype)
        attend_all(
            *(q, pages, query_start, page_table, positions, q, scratch, out),
            *(n, batch, max_pages),
        )

    return paged_attention_kernel
