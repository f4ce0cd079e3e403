"""Row-wise kernels around recurrences: mixing with the token before, decays, gated norms.

Rows are (n, width) float32; vectors of parameters have the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.norm import statistics
from mlc_llm.kernels.cpu.vector_math import (
    exp,
    lane_dtype,
    multiply_add,
    silu,
    span,
    splat,
    vector_lanes,
)

# Below this many rows a parallel launch costs more than it saves (benchmarks/kernels.py).
_SERIAL_ROWS = 12


def lerp(width: int, dtype: str) -> Any:
    """Mix rows: x, y, weight (1, 1, width) -> x + (y - x) * weight."""
    lanes = vector_lanes(width)
    vector = lane_dtype("float32", lanes)

    @T.prim_func(private=True, s_tir=True)
    def lerp_kernel(
        x_handle: T.handle,
        y_handle: T.handle,
        weight: T.Buffer((1, 1, width), dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        y = T.match_buffer(y_handle, (n, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for row in T.serial(n):
            for i in T.serial(width // lanes):
                out[row, span(i * lanes, lanes)] = multiply_add(
                    y[row, span(i * lanes, lanes)] - x[row, span(i * lanes, lanes)],
                    T.Cast(vector, weight[0, 0, span(i * lanes, lanes)]),
                    x[row, span(i * lanes, lanes)],
                    lanes,
                )

    return lerp_kernel


def low_rank_lerp(width: int, rank: int, num_parts: int, part: int, dtype: str) -> Any:
    """Mix rows by weights that depend on the row: Finch's token shift.

    x, y; low (n, parts * rank) float32; up (parts, rank, width); base (1, 1, width)
    -> x + (y - x) * (base + low[part] · up[part]).
    """
    lanes = vector_lanes(width)
    vector = lane_dtype("float32", lanes)

    @T.macro
    def mix(
        x: T.handle,
        y: T.handle,
        low: T.handle,
        up: T.handle,
        base: T.handle,
        out: T.handle,
        row: T.int32,
        i: T.int32,
    ) -> None:
        weight = T.alloc_buffer((lanes,), "float32")
        weight[span(0, lanes)] = T.Cast(vector, base[0, 0, span(i * lanes, lanes)])
        for d in T.serial(rank):
            weight[span(0, lanes)] = multiply_add(
                splat(low[row, part * rank + d], lanes),
                T.Cast(vector, up[part, d, span(i * lanes, lanes)]),
                weight[span(0, lanes)],
                lanes,
            )
        out[row, span(i * lanes, lanes)] = multiply_add(
            y[row, span(i * lanes, lanes)] - x[row, span(i * lanes, lanes)],
            weight[span(0, lanes)],
            x[row, span(i * lanes, lanes)],
            lanes,
        )

    @T.prim_func(private=True, s_tir=True)
    def low_rank_lerp_kernel(
        x_handle: T.handle,
        y_handle: T.handle,
        low_handle: T.handle,
        up: T.Buffer((num_parts, rank, width), dtype),
        base: T.Buffer((1, 1, width), dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        y = T.match_buffer(y_handle, (n, width), "float32")
        low = T.match_buffer(low_handle, (n, num_parts * rank), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        # Columns outside: their part of `up` serves all rows.
        for i in T.parallel(width // lanes):
            for row in T.serial(n):
                mix(x, y, low, up, base, out, row, i)

    return low_rank_lerp_kernel


def _elementwise(width: int, function: Callable[[Any, int], Any]) -> Any:
    lanes = vector_lanes(width)

    @T.prim_func(private=True, s_tir=True)
    def elementwise_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for row in T.serial(n):
            for i in T.serial(width // lanes):
                out[row, span(i * lanes, lanes)] = function(x[row, span(i * lanes, lanes)], lanes)

    return elementwise_kernel


def tanh(width: int) -> Any:
    """Apply tanh to rows; the absolute error is below 3e-7."""

    def one_minus(x: Any, lanes: int) -> Any:
        # tanh x = 1 - 2 / (e**2x + 1), where neither a large nor a small power does harm.
        one, two = splat(T.float32(1), lanes), splat(T.float32(2), lanes)
        return one - two / (exp(two * x, lanes) + one)

    return _elementwise(width, one_minus)


def _decay_of(x: Any, lanes: int) -> Any:
    return exp(splat(T.float32(0), lanes) - exp(x, lanes), lanes)


def dynamic_decay(width: int, dtype: str) -> Any:
    """Compute Finch's decays: x (n, width), base (1, 1, width) -> exp(-exp(base + x))."""
    lanes = vector_lanes(width)
    vector = lane_dtype("float32", lanes)

    @T.prim_func(private=True, s_tir=True)
    def dynamic_decay_kernel(
        x_handle: T.handle, base: T.Buffer((1, 1, width), dtype), out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for row in T.serial(n):
            for i in T.serial(width // lanes):
                out[row, span(i * lanes, lanes)] = _decay_of(
                    x[row, span(i * lanes, lanes)]
                    + T.Cast(vector, base[0, 0, span(i * lanes, lanes)]),
                    lanes,
                )

    return dynamic_decay_kernel


def static_decay(num_heads: int, head_size: int, dtype: str) -> Any:
    """Compute Eagle's decays: (heads, size) -> exp(-exp(x)), (1, heads * size) float32."""
    lanes = vector_lanes(head_size)
    vector = lane_dtype("float32", lanes)

    @T.prim_func(private=True, s_tir=True)
    def static_decay_kernel(
        x: T.Buffer((num_heads, head_size), dtype),
        out: T.Buffer((1, num_heads * head_size), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for h in T.serial(num_heads):
            for i in T.serial(head_size // lanes):
                out[0, span(h * head_size + i * lanes, lanes)] = _decay_of(
                    T.Cast(vector, x[h, span(i * lanes, lanes)]), lanes
                )

    return static_decay_kernel


def gated_head_norm(
    num_heads: int, head_dim: int, dtype: str, eps: float, is_group_norm: bool
) -> Any:
    """Normalise each head, scale, multiply with silu of a gate: x, gate (n, heads * dim).

    A group norm centers, and its weight and bias are (heads * dim) (RWKV); else it is a root mean
    square norm with weights (dim) for every head, and the bias, of that size, is added as well.
    """
    width = num_heads * head_dim
    lanes = vector_lanes(head_dim)
    vector = lane_dtype("float32", lanes)
    statistics_of = statistics(head_dim, eps, is_centered=is_group_norm)
    num_weights = width if is_group_norm else head_dim
    step = head_dim if is_group_norm else 0

    @T.macro
    def normalise(
        x: T.handle, gate: T.handle, weight: T.handle, bias: T.handle, out: T.handle, row: T.int32
    ) -> None:
        found = T.alloc_buffer((2,), "float32")
        for h in T.serial(num_heads):
            statistics_of(x, found, row, h * head_dim)
            for i in T.serial(head_dim // lanes):
                out[row, span(h * head_dim + i * lanes, lanes)] = multiply_add(
                    (x[row, span(h * head_dim + i * lanes, lanes)] - splat(found[0], lanes))
                    * splat(found[1], lanes),
                    T.Cast(vector, weight[span(h * step + i * lanes, lanes)]),
                    T.Cast(vector, bias[span(h * step + i * lanes, lanes)]),
                    lanes,
                ) * silu(gate[row, span(h * head_dim + i * lanes, lanes)], lanes)

    @T.prim_func(private=True, s_tir=True)
    def gated_head_norm_kernel(
        x_handle: T.handle,
        gate_handle: T.handle,
        weight: T.Buffer((num_weights,), dtype),
        bias: T.Buffer((num_weights,), dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        gate = T.match_buffer(gate_handle, (n, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                normalise(x, gate, weight, bias, out, row)
        else:
            for row in T.parallel(n):
                normalise(x, gate, weight, bias, out, row)

    return gated_head_norm_kernel


def sigmoid_mul(num_heads: int, head_dim: int, stride: int, offset: int, gate_width: int) -> Any:
    """Gate heads: x (n, heads * dim), gates (n, gate_width) -> x * sigmoid(gate).

    The gates of head h begin at column h * stride + offset.
    """
    width = num_heads * head_dim
    lanes = vector_lanes(head_dim)

    @T.prim_func(private=True, s_tir=True)
    def sigmoid_mul_kernel(x_handle: T.handle, gate_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        gate = T.match_buffer(gate_handle, (n, gate_width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for row in T.serial(n):
            for h in T.serial(num_heads):
                for i in T.serial(head_dim // lanes):
                    out[row, span(h * head_dim + i * lanes, lanes)] = x[
                        row, span(h * head_dim + i * lanes, lanes)
                    ] / (
                        splat(T.float32(1), lanes)
                        + exp(
                            splat(T.float32(0), lanes)
                            - gate[row, span(h * stride + offset + i * lanes, lanes)],
                            lanes,
                        )
                    )

    return sigmoid_mul_kernel


def drop_gates(num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """Leave out the gates behind each query head: (n, 2 * heads * dim + 2 * kv_heads * dim) with
    [q; gate] of each head, k, v -> [q; k; v].
    """
    wide, width = 2 * num_heads * head_dim, num_heads * head_dim
    rest = 2 * num_kv_heads * head_dim

    @T.prim_func(private=True, s_tir=True)
    def drop_gates_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, wide + rest), "float32")
        out = T.match_buffer(out_handle, (n, width + rest), "float32")
        for row in T.serial(n):
            for h in T.serial(num_heads):
                for i in T.serial(head_dim):
                    out[row, h * head_dim + i] = x[row, 2 * h * head_dim + i]
            for i in T.serial(rest):
                out[row, width + i] = x[row, wide + i]

    return drop_gates_kernel
