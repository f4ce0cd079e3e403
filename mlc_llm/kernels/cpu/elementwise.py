"""Row-wise kernels without a matrix product: norm, gated activation, residual, row gather."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    lane_dtype,
    multiply_add,
    reduce_sum,
    silu,
    span,
    splat,
    vector_lanes,
)

# Below this many rows a parallel launch costs more than it saves (benchmarks/kernels.py).
_SERIAL_ROWS = 12


def rms_factor(hidden_size: int, eps: float) -> Any:
    """Return a macro (x, factor, row): factor[0] = 1 / sqrt(mean(x[row]**2) + eps)."""
    lanes = vector_lanes(hidden_size)

    @T.macro
    def compute(x: T.handle, factor: T.handle, row: T.int32) -> None:
        total = T.alloc_buffer((lanes,), "float32")
        total[span(0, lanes)] = splat(T.float32(0), lanes)
        for i in T.serial(hidden_size // lanes):
            total[span(0, lanes)] = multiply_add(
                x[row, span(i * lanes, lanes)],
                x[row, span(i * lanes, lanes)],
                total[span(0, lanes)],
                lanes,
            )
        factor[0] = T.float32(1) / T.sqrt(
            reduce_sum(total[span(0, lanes)], lanes) / T.float32(hidden_size) + T.float32(eps)
        )

    return compute


def rms_norm(hidden_size: int, weight_dtype: str, eps: float) -> Any:
    """Normalise rows: x (n, h) float32, weight (h) -> (n, h) float32.

    Zhang and Sennrich 2019: x / sqrt(mean(x**2) + eps) * weight.
    """
    lanes = vector_lanes(hidden_size)
    steps = hidden_size // lanes
    vector = lane_dtype("float32", lanes)

    factor_of = rms_factor(hidden_size, eps)

    @T.macro
    def normalise(x: T.handle, weight: T.handle, out: T.handle, row: T.int32) -> None:
        factor = T.alloc_buffer((1,), "float32")
        factor_of(x, factor, row)
        for i in T.serial(steps):
            out[row, span(i * lanes, lanes)] = (
                x[row, span(i * lanes, lanes)]
                * splat(factor[0], lanes)
                * T.Cast(vector, weight[span(i * lanes, lanes)])
            )

    @T.prim_func(private=True, s_tir=True)
    def rms_norm_kernel(x_handle: T.handle, weight_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, hidden_size), "float32")
        weight = T.match_buffer(weight_handle, (hidden_size,), weight_dtype)
        out = T.match_buffer(out_handle, (n, hidden_size), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                normalise(x, weight, out, row)
        else:
            for row in T.parallel(n):
                normalise(x, weight, out, row)

    return rms_norm_kernel


def silu_mul(width: int) -> Any:
    """Apply silu to the gate and multiply: (n, 2 * width) [gate; up] -> (n, width), float32."""
    lanes = vector_lanes(width)

    @T.macro
    def activate(x: T.handle, out: T.handle, row: T.int32) -> None:
        for i in T.serial(width // lanes):
            out[row, span(i * lanes, lanes)] = (
                silu(x[row, span(i * lanes, lanes)], lanes) * x[row, span(width + i * lanes, lanes)]
            )

    @T.prim_func(private=True, s_tir=True)
    def silu_mul_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, 2 * width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                activate(x, out, row)
        else:
            for row in T.parallel(n):
                activate(x, out, row)

    return silu_mul_kernel


def add(width: int) -> Any:
    """Add two (n, width) float32 arrays."""
    lanes = vector_lanes(width)

    @T.prim_func(private=True, s_tir=True)
    def add_kernel(x_handle: T.handle, y_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        y = T.match_buffer(y_handle, (n, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for row in T.serial(n):
            for i in T.serial(width // lanes):
                out[row, span(i * lanes, lanes)] = (
                    x[row, span(i * lanes, lanes)] + y[row, span(i * lanes, lanes)]
                )

    return add_kernel


def take_rows(width: int) -> Any:
    """Gather rows: x (n, width) float32, rows (r) int32 -> (r, width)."""

    @T.prim_func(private=True, s_tir=True)
    def take_rows_kernel(x_handle: T.handle, rows_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        r = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        rows = T.match_buffer(rows_handle, (r,), "int32")
        out = T.match_buffer(out_handle, (r, width), "float32")
        for i in T.serial(r):
            for j in T.serial(width):
                out[i, j] = x[rows[i], j]

    return take_rows_kernel


def join(first: int, second: int) -> Any:
    """Put rows side by side: (n, first) and (n, second) float32 -> (n, first + second)."""

    @T.prim_func(private=True, s_tir=True)
    def join_kernel(x_handle: T.handle, y_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, first), "float32")
        y = T.match_buffer(y_handle, (n, second), "float32")
        out = T.match_buffer(out_handle, (n, first + second), "float32")
        for row in T.serial(n):
            for i in T.serial(first):
                out[row, i] = x[row, i]
            for i in T.serial(second):
                out[row, first + i] = y[row, i]

    return join_kernel
