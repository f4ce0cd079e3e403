"""Rows without a matrix product: norms, activations, joins, each a computation without a schedule.

Rows are float16, bfloat16 or float32 and come out as they went in; arithmetic is float32. Factories
take the number of rows, None for one known at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import te, tirx

from mlc_llm.kernels.cpu.query_scale import QueryScale

# Abramowitz and Stegun 1964, 7.1.26: erf with an absolute error below 1.5e-7.
_ERF_SLOPE = 0.3275911
_ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)

RowCount = int | None


def num_rows(n: RowCount) -> Any:
    """Return the number of rows, a variable where it is not known."""
    return te.var("n", "int64") if n is None else n


def tensor(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """Return an argument of a kernel, of that name in its code."""
    return te.placeholder(_wide_extents(shape), dtype, name=name)


def compute(shape: tuple[Any, ...], item: Callable[..., Any], name: str) -> Any:
    """Return the tensor of item(indices)."""
    return te.compute(_wide_extents(shape), item, name=name)


def summed(count: int) -> Any:
    """Return an index that a sum runs over, from 0 to below count."""
    return te.reduce_axis((tirx.const(0, "int64"), tirx.const(count, "int64")))


def _wide_extents(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    # Extents of the model's tensors are 64 bits wide; kernels are fused with them.
    return tuple(tirx.const(n, "int64") if isinstance(n, int) else n for n in shape)


def computation(tensors: list[Any]) -> Any:
    """Return the kernel that computes the last of these tensors; rules schedule it later."""
    return te.create_prim_func(tensors).without_attr("global_symbol")


def wide(value: Any) -> Any:
    """Return an item of a tensor as float32."""
    return value if value.dtype == "float32" else tirx.Cast("float32", value)


def narrow(value: Any, dtype: str) -> Any:
    """Return a float32 value as `dtype`."""
    return value if dtype == "float32" else tirx.Cast(dtype, value)


def constant(value: float) -> Any:
    """Return a float32 number."""
    return tirx.const(value, "float32")


def _sigmoid_times(x: Any, argument: Any) -> Any:
    return x / (constant(1) + tirx.exp(-argument))


def _gelu(x: Any) -> Any:
    size = tirx.abs(x) * constant(0.7071067811865476)
    t = constant(1) / (size * constant(_ERF_SLOPE) + constant(1))
    poly = constant(_ERF_COEFFICIENTS[0])
    for coefficient in _ERF_COEFFICIENTS[1:]:
        poly = poly * t + constant(coefficient)
    rest = poly * t * tirx.exp(-size * size) * constant(0.5)
    return x * tirx.Select(x > constant(0), constant(1) - rest, rest)


def _gelu_tanh(x: Any) -> Any:
    # (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3).
    inner = x * x * constant(0.044715) + constant(1)
    return _sigmoid_times(x, x * inner * constant(1.5957691216057308))


def _relu(x: Any) -> Any:
    return tirx.max(x, constant(0))


ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "silu": lambda x: _sigmoid_times(x, x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: _sigmoid_times(x, x * constant(1.702)),
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
}


def _map(n: RowCount, dtype: str, inputs: list[int], width: int, value: Callable[..., Any]) -> Any:
    """Return a kernel of rows of these widths; item c of row i is value(inputs, i, c), float32."""
    rows = num_rows(n)
    tensors = [tensor(f"x{k}", (rows, items), dtype) for k, items in enumerate(inputs)]

    def item(i: Any, c: Any) -> Any:
        return narrow(value([lambda i, c, t=t: wide(t[i, c]) for t in tensors], i, c), dtype)

    out = compute((rows, width), item, name="out")
    return computation([*tensors, out])


def add(n: RowCount, width: int, dtype: str) -> Any:
    """Add: x (n, width), y (n, width) -> (n, width)."""
    return _map(n, dtype, [width, width], width, lambda t, i, c: t[0](i, c) + t[1](i, c))


def join(n: RowCount, widths: tuple[int, int], dtype: str) -> Any:
    """Join: x (n, widths[0]), y (n, widths[1]) -> (n, sum of widths)."""
    first = widths[0]

    def value(t: Any, i: Any, c: Any) -> Any:
        return tirx.if_then_else(c < first, t[0](i, c), t[1](i, c - first))

    return _map(n, dtype, list(widths), sum(widths), value)


def activate(n: RowCount, width: int, kind: str, dtype: str) -> Any:
    """Apply an activation: (n, width) -> the same."""
    return _map(n, dtype, [width], width, lambda t, i, c: ACTIVATIONS[kind](t[0](i, c)))


def gated(n: RowCount, width: int, kind: str, is_gate_first: bool, dtype: str) -> Any:
    """Activate the gate and multiply: (n, 2 * width) -> (n, width)."""
    gate, up = (0, width) if is_gate_first else (width, 0)

    def value(t: Any, i: Any, c: Any) -> Any:
        return ACTIVATIONS[kind](t[0](i, gate + c)) * t[0](i, up + c)

    return _map(n, dtype, [2 * width], width, value)


def bounded_swiglu(n: RowCount, width: int, alpha: float, limit: float, dtype: str) -> Any:
    """Activate the gate and multiply: [gate; up] (n, 2 * width) -> (n, width).

    gate * sigmoid(alpha * gate) * (up + 1), where gates are at most the limit and the others
    within +-limit (OpenAI 2025, gpt-oss model card, section 2.2).
    """

    def value(t: Any, i: Any, c: Any) -> Any:
        gate = tirx.min(t[0](i, c), constant(limit))
        up = tirx.max(tirx.min(t[0](i, width + c), constant(limit)), constant(-limit))
        return _sigmoid_times(gate, gate * constant(alpha)) * (up + constant(1))

    return _map(n, dtype, [2 * width], width, value)


def scale(n: RowCount, width: int, factor: float, dtype: str) -> Any:
    """Multiply every item: (n, width) -> the same."""
    return _map(n, dtype, [width], width, lambda t, i, c: t[0](i, c) * constant(factor))


def scale_queries(n: RowCount, width: int, q_width: int, scale: QueryScale, dtype: str) -> Any:
    """Scale: x (n, width), positions (n) int32 -> x with the first q_width items of each row times
    the factor of its position.
    """
    rows = num_rows(n)
    x = tensor("x", (rows, width), dtype)
    positions = tensor("positions", (rows,), "int32")
    offset, period = (tirx.const(number, "int32") for number in (scale.offset, scale.period))

    def item(i: Any, c: Any) -> Any:
        steps = tirx.Cast("float32", (positions[i] + offset) // period)
        factor = constant(1) + constant(scale.strength) * tirx.log(constant(1) + steps)
        return tirx.if_then_else(c < q_width, narrow(wide(x[i, c]) * factor, dtype), x[i, c])

    return computation([x, positions, compute((rows, width), item, name="out")])


def clip(n: RowCount, width: int, bound: float, dtype: str) -> Any:
    """Keep every item within +-bound: (n, width) -> the same."""

    def value(t: Any, i: Any, c: Any) -> Any:
        return tirx.max(tirx.min(t[0](i, c), constant(bound)), constant(-bound))

    return _map(n, dtype, [width], width, value)


def soft_cap(n: RowCount, width: int, cap: float, dtype: str) -> Any:
    """Bound every item: cap * tanh(x / cap), (n, width) -> the same."""

    def value(t: Any, i: Any, c: Any) -> Any:
        # tanh(u) = 1 - 2 / (e**2u + 1); far out the power is bounded, where tanh is 1 already.
        power = tirx.exp(tirx.min(t[0](i, c) * constant(2 / cap), constant(60)))
        return constant(cap) - constant(2 * cap) / (power + constant(1))

    return _map(n, dtype, [width], width, value)


def take_rows(n: RowCount, width: int, dtype: str) -> Any:
    """Take rows: x (m, width), rows (n) int32 -> (n, width)."""
    rows, items = num_rows(n), te.var("m", "int64")
    x = tensor("x", (items, width), dtype)
    chosen = tensor("chosen", (rows,), "int32")
    out = compute((rows, width), lambda i, c: x[chosen[i], c], name="out")
    return computation([x, chosen, out])


def last_row(width: int, dtype: str) -> Any:
    """Take the last row: x (n, width) -> (1, width)."""
    rows = num_rows(None)
    x = tensor("x", (rows, width), dtype)
    out = compute((1, width), lambda i, c: x[rows - 1 + i, c], name="out")
    return computation([x, out])


def rms_norm(n: RowCount, width: int, eps: float, dtype: str) -> Any:
    """Normalise rows: x (n, width), weight (width) -> (n, width), x / rms(x) * weight."""
    rows = num_rows(n)
    x = tensor("x", (rows, width), dtype)
    weight = tensor("weight", (width,), dtype)
    k = summed(width)
    total = compute((rows,), lambda i: te.sum(wide(x[i, k]) * wide(x[i, k]), k), name="total")

    def item(i: Any, c: Any) -> Any:
        factor = tirx.rsqrt(total[i] / constant(width) + constant(eps))
        return narrow(wide(x[i, c]) * factor * wide(weight[c]), dtype)

    out = compute((rows, width), item, name="out")
    return computation([x, weight, out])


def layer_norm(n: RowCount, width: int, eps: float, adds_one: bool, dtype: str) -> Any:
    """Normalise rows: x (n, width), weight (width), bias (width) -> (n, width).

    (x - mean) / sqrt(variance + eps) * weight + bias; adds_one: * (1 + weight).
    """
    rows = num_rows(n)
    x = tensor("x", (rows, width), dtype)
    weight = tensor("weight", (width,), dtype)
    bias = tensor("bias", (width,), dtype)
    k, j = summed(width), summed(width)
    total = compute((rows,), lambda i: te.sum(wide(x[i, k]), k), name="total")

    def square(i: Any) -> Any:
        rest = wide(x[i, j]) - total[i] / constant(width)
        return te.sum(rest * rest, j)

    squares = compute((rows,), square, name="squares")

    def item(i: Any, c: Any) -> Any:
        factor = tirx.rsqrt(squares[i] / constant(width) + constant(eps))
        slope = wide(weight[c]) + constant(1 if adds_one else 0)
        rest = wide(x[i, c]) - total[i] / constant(width)
        return narrow(rest * factor * slope + wide(bias[c]), dtype)

    out = compute((rows, width), item, name="out")
    return computation([x, weight, bias, out])


def norm_parts(n: RowCount, width: int, part: int, items: int, eps: float, dtype: str) -> Any:
    """Normalise parts of rows by themselves: x (n, width), weight (items) -> (n, width).

    A row has width / part parts; the weights repeat over them.
    """
    rows, parts = num_rows(n), width // part
    x = tensor("x", (rows, width), dtype)
    weight = tensor("weight", (items,), dtype)
    k = summed(part)
    total = compute(
        (rows, parts),
        lambda i, p: te.sum(wide(x[i, p * part + k]) * wide(x[i, p * part + k]), k),
        name="total",
    )

    def item(i: Any, c: Any) -> Any:
        factor = tirx.rsqrt(total[i, c // part] / constant(part) + constant(eps))
        return narrow(wide(x[i, c]) * factor * wide(weight[c % items]), dtype)

    out = compute((rows, width), item, name="out")
    return computation([x, weight, out])


def columns(n: RowCount, width: int, start: int, count: int, dtype: str) -> Any:
    """Take columns: x (n, width) -> (n, count), those from `start` on."""
    return _map(n, dtype, [width], count, lambda t, i, c: t[0](i, start + c))
