"""Kernels of models that see a text as a whole: how far each token sees, and one row for all."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import span, vector_lanes


def last_positions() -> Any:
    """Spread the end of each sequence over its tokens: query_start (b + 1), context_len (b),
    positions (n), all int32 -> (n) int32, the position of the last token of the sequence.

    Causal attention up to these positions is attention to the whole sequence.
    """

    @T.prim_func(private=True, s_tir=True)
    def last_positions_kernel(
        query_start_handle: T.handle,
        context_len_handle: T.handle,
        positions_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        batch = T.int32()
        starts = T.int32()
        query_start = T.match_buffer(query_start_handle, (starts,), "int32")
        context_len = T.match_buffer(context_len_handle, (batch,), "int32")
        # It only says how many tokens there are.
        T.match_buffer(positions_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n,), "int32")
        for s in T.serial(batch):
            for i in T.serial(query_start[s + 1] - query_start[s]):
                out[query_start[s] + i] = context_len[s] - 1

    return last_positions_kernel


def add_row(width: int) -> Any:
    """Add one row to all: x (n, width), row (1, width) -> (n, width), float32."""
    lanes = vector_lanes(width)

    @T.prim_func(private=True, s_tir=True)
    def add_row_kernel(x_handle: T.handle, row_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        row = T.match_buffer(row_handle, (1, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for t in T.serial(n):
            for i in T.serial(width // lanes):
                out[t, span(i * lanes, lanes)] = (
                    x[t, span(i * lanes, lanes)] + row[0, span(i * lanes, lanes)]
                )

    return add_row_kernel
