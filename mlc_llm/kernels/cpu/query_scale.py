"""Queries that grow with the length of the text before them, inside the fused q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import span, splat, vector_lanes

# Below this many rows a parallel launch costs more than it saves (benchmarks/kernels.py).
_SERIAL_ROWS = 12


@dataclass(frozen=True)
class QueryScale:
    """The factor of a query at position p: 1 + strength * log(1 + floor((p + offset) / period)).

    Nakanishi 2025, in the steps that Llama 4 takes it in. period and offset are in tokens.
    """

    strength: float
    period: int
    offset: int = 0


def scale_queries(scale: QueryScale, q_width: int, width: int) -> Any:
    """Scale: x (n, width) float32, positions (n) int32 -> x with the first q_width items of each
    row times the factor of its position.
    """
    lanes, rest_lanes = vector_lanes(q_width), vector_lanes(width - q_width)
    strength, period, offset = scale.strength, scale.period, scale.offset

    @T.macro
    def one_row(x: T.handle, positions: T.handle, out: T.handle, row: T.int32) -> None:
        factor = T.alloc_buffer((1,), "float32")
        factor[0] = T.float32(1) + T.float32(strength) * T.log(
            T.Cast("float32", 1 + (positions[row] + offset) // period)
        )
        for i in T.serial(q_width // lanes):
            out[row, span(i * lanes, lanes)] = x[row, span(i * lanes, lanes)] * splat(
                factor[0], lanes
            )
        for i in T.serial((width - q_width) // rest_lanes):
            out[row, span(q_width + i * rest_lanes, rest_lanes)] = x[
                row, span(q_width + i * rest_lanes, rest_lanes)
            ]

    @T.prim_func(private=True, s_tir=True)
    def scale_queries_kernel(
        x_handle: T.handle, positions_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                one_row(x, positions, out, row)
        else:
            for row in T.parallel(n):
                one_row(x, positions, out, row)

    return scale_queries_kernel
