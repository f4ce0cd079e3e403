"""Activation functions of feed-forward layers, alone and with a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    exp,
    multiply_add,
    silu,
    span,
    splat,
    vector_lanes,
)

# Below this many rows a parallel launch costs more than it saves (benchmarks/kernels.py).
_SERIAL_ROWS = 12
# Abramowitz and Stegun 1964, 7.1.26: erf with an absolute error below 1.5e-7.
_ERF_SLOPE = 0.3275911
_ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _sigmoid_times(x: Any, argument: Any, lanes: int) -> Any:
    return x / (splat(T.float32(1), lanes) + exp(-argument, lanes))


def _gelu(x: Any, lanes: int) -> Any:
    # x * (1 + erf(x / sqrt 2)) / 2; erf of the magnitude, the sign put back.
    size = T.max(x, -x) * splat(T.float32(0.7071067811865476), lanes)
    one = splat(T.float32(1), lanes)
    t = one / multiply_add(size, splat(T.float32(_ERF_SLOPE), lanes), one, lanes)
    poly = splat(T.float32(_ERF_COEFFICIENTS[0]), lanes)
    for coefficient in _ERF_COEFFICIENTS[1:]:
        poly = multiply_add(poly, t, splat(T.float32(coefficient), lanes), lanes)
    # What is left to 1: erfc of the magnitude.
    rest = poly * t * exp(-size * size, lanes) * splat(T.float32(0.5), lanes)
    positive = x > splat(T.float32(0), lanes)
    return x * T.Select(positive, one - rest, rest)


def _gelu_tanh(x: Any, lanes: int) -> Any:
    # (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3).
    inner = multiply_add(
        x * x, splat(T.float32(0.044715), lanes), splat(T.float32(1), lanes), lanes
    )
    return _sigmoid_times(x, x * inner * splat(T.float32(1.5957691216057308), lanes), lanes)


def _quick_gelu(x: Any, lanes: int) -> Any:
    return _sigmoid_times(x, x * splat(T.float32(1.702), lanes), lanes)


def _relu(x: Any, lanes: int) -> Any:
    return T.max(x, splat(T.float32(0), lanes))


def _relu2(x: Any, lanes: int) -> Any:
    return _relu(x, lanes) * _relu(x, lanes)


ACTIVATIONS: Mapping[str, Callable[[Any, int], Any]] = {
    "silu": silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
}


def activate(width: int, kind: str) -> Any:
    """Apply an activation: (n, width) float32 -> the same."""
    return _row_kernel(width, width, lambda x, i, row, lanes: _apply(x, row, i, lanes, kind))


def gated(width: int, kind: str, is_gate_first: bool) -> Any:
    """Activate the gate and multiply: (n, 2 * width) float32 -> (n, width).

    The gate is the first half, or the second.
    """
    gate, up = (0, width) if is_gate_first else (width, 0)

    def compute(x: Any, i: Any, row: Any, lanes: int) -> Any:
        return _apply(x, row, gate + i, lanes, kind) * x[row, span(up + i, lanes)]

    return _row_kernel(2 * width, width, compute)


def bounded_swiglu(width: int, alpha: float, limit: float) -> Any:
    """Activate the gate and multiply: [gate; up] (n, 2 * width) float32 -> (n, width).

    gate * sigmoid(alpha * gate) * (up + 1), where gates are at most the limit and the others
    within +-limit (OpenAI 2025, gpt-oss model card, section 2.2).
    """

    def compute(x: Any, i: Any, row: Any, lanes: int) -> Any:
        low, high = splat(T.float32(-limit), lanes), splat(T.float32(limit), lanes)
        gate = T.min(x[row, span(i, lanes)], high)
        up = T.max(T.min(x[row, span(width + i, lanes)], high), low)
        active = _sigmoid_times(gate, gate * splat(T.float32(alpha), lanes), lanes)
        return active * (up + splat(T.float32(1), lanes))

    return _row_kernel(2 * width, width, compute)


def _apply(x: Any, row: Any, start: Any, lanes: int, kind: str) -> Any:
    return ACTIVATIONS[kind](x[row, span(start, lanes)], lanes)


def _row_kernel(in_width: int, width: int, compute: Callable[[Any, Any, Any, int], Any]) -> Any:
    """Return a kernel whose vector at item i of a row is compute(x, i, row, lanes)."""
    lanes = vector_lanes(width)

    @T.macro
    def one_row(x: T.handle, out: T.handle, row: T.int32) -> None:
        for i in T.serial(width // lanes):
            out[row, span(i * lanes, lanes)] = compute(x, i * lanes, row, lanes)

    @T.prim_func(private=True, s_tir=True)
    def row_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, in_width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                one_row(x, out, row)
        else:
            for row in T.parallel(n):
                one_row(x, out, row)

    return row_kernel


def scale(width: int, factor: float) -> Any:
    """Multiply every item: (n, width) float32 -> the same."""

    def compute(x: Any, i: Any, row: Any, lanes: int) -> Any:
        return x[row, span(i, lanes)] * splat(T.float32(factor), lanes)

    return _row_kernel(width, width, compute)


def clip(width: int, bound: float) -> Any:
    """Keep every item within +-bound: (n, width) float32 -> the same."""

    def compute(x: Any, i: Any, row: Any, lanes: int) -> Any:
        low, high = splat(T.float32(-bound), lanes), splat(T.float32(bound), lanes)
        return T.max(T.min(x[row, span(i, lanes)], high), low)

    return _row_kernel(width, width, compute)


def soft_cap(width: int, cap: float) -> Any:
    """Bound every item: cap * tanh(x / cap), (n, width) float32 -> the same (Gemma 2)."""

    def compute(x: Any, i: Any, row: Any, lanes: int) -> Any:
        # tanh(u) = 1 - 2 / (e**2u + 1)
        power = exp(x[row, span(i, lanes)] * splat(T.float32(2 / cap), lanes), lanes)
        ratio = splat(T.float32(2 * cap), lanes) / (power + splat(T.float32(1), lanes))
        return splat(T.float32(cap), lanes) - ratio

    return _row_kernel(width, width, compute)
