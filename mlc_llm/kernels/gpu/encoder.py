"""Kernels of models that see a text as a whole: how far each token sees, and one row for all."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.gpu.attention_pages import THREADS
from mlc_llm.kernels.gpu.rows import (
    RowCount,
    computation,
    compute,
    narrow,
    num_rows,
    tensor,
    wide,
)


def last_positions() -> Any:
    """Spread the end of each sequence over its tokens: query_start (b + 1), context_len (b),
    positions (n), all int32 -> (n) int32, the position of the last token of the sequence.
    """

    @T.prim_func(private=True, s_tir=True)
    def last_positions_kernel(
        query_start_handle: T.handle,
        context_len_handle: T.handle,
        positions_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, starts = T.int32(), T.int32(), T.int32()
        query_start = T.match_buffer(query_start_handle, (starts,), "int32")
        context_len = T.match_buffer(context_len_handle, (batch,), "int32")
        # It only says how many tokens there are.
        T.match_buffer(positions_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n,), "int32")
        for block in T.thread_binding((n + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                t: T.let = block * THREADS + thread
                for s in T.serial(batch):
                    if query_start[s] <= t and t < query_start[s + 1]:
                        out[t] = context_len[s] - 1

    return last_positions_kernel


def add_row(n: RowCount, width: int, dtype: str) -> Any:
    """Add one row to all: x (n, width), row (1, width) -> (n, width)."""
    rows = num_rows(n)
    x, row = tensor("x", (rows, width), dtype), tensor("row", (1, width), dtype)
    out = compute(
        (rows, width), lambda i, c: narrow(wide(x[i, c]) + wide(row[0, c]), dtype), name="out"
    )
    return computation([x, row, out])
