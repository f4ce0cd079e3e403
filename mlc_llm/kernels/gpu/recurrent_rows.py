"""Rows around recurrences on GPUs: mixing with the token before, decays, gated norms.

Like `rows.py`: computations without a schedule, rows of one dtype, arithmetic in float32. What
recurrences make, and the decays that they read, are float32.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from mlc_llm.kernels.gpu.rows import (
    ACTIVATIONS,
    RowCount,
    computation,
    compute,
    constant,
    narrow,
    num_rows,
    summed,
    tensor,
    wide,
)


def lerp(n: RowCount, width: int, dtype: str) -> Any:
    """Mix rows: x, y (n, width), weight (1, 1, width) -> x + (y - x) * weight."""
    rows = num_rows(n)
    x, y = (tensor(name, (rows, width), dtype) for name in "xy")
    weight = tensor("weight", (1, 1, width), dtype)

    def item(i: Any, c: Any) -> Any:
        start = wide(x[i, c])
        return narrow(start + (wide(y[i, c]) - start) * wide(weight[0, 0, c]), dtype)

    return computation([x, y, weight, compute((rows, width), item, name="out")])


def low_rank_lerp(n: RowCount, width: int, rank: int, num_parts: int, part: int, dtype: str) -> Any:
    """Mix rows by weights that depend on the row: Finch's token shift.

    x, y (n, width), low (n, parts * rank), up (parts, rank, width), base (1, 1, width)
    -> x + (y - x) * (base + low[part] · up[part]).
    """
    rows = num_rows(n)
    x, y = (tensor(name, (rows, width), dtype) for name in "xy")
    low = tensor("low", (rows, num_parts * rank), dtype)
    up = tensor("up", (num_parts, rank, width), dtype)
    base = tensor("base", (1, 1, width), dtype)
    k = summed(rank)
    total = compute(
        (rows, width),
        lambda i, c: te.sum(wide(low[i, part * rank + k]) * wide(up[part, k, c]), k),
        name="total",
    )

    def item(i: Any, c: Any) -> Any:
        start = wide(x[i, c])
        weight = wide(base[0, 0, c]) + total[i, c]
        return narrow(start + (wide(y[i, c]) - start) * weight, dtype)

    return computation([x, y, low, up, base, compute((rows, width), item, name="out")])


def matmul_in_out(n: RowCount, in_features: int, out_features: int, dtype: str) -> Any:
    """Multiply: x (n, in), weight (in, out) -> (n, out)."""
    rows = num_rows(n)
    x = tensor("x", (rows, in_features), dtype)
    weight = tensor("weight", (in_features, out_features), dtype)
    k = summed(in_features)
    shape = (rows, out_features)
    is_result = dtype == "float32"
    out = total = compute(
        shape,
        lambda i, o: te.sum(wide(x[i, k]) * wide(weight[k, o]), k),
        name="out" if is_result else "total",
    )
    if not is_result:
        out = compute(shape, lambda i, o: narrow(total[i, o], dtype), name="out")
    return computation([x, weight, out])


def _decay_of(x: Any) -> Any:
    return tirx.exp(-tirx.exp(x))


def dynamic_decay(n: RowCount, width: int, dtype: str, base_dtype: str) -> Any:
    """Compute Finch's decays: x (n, width) of dtype, base (1, 1, width) of base_dtype
    -> exp(-exp(base + x)), float32.
    """
    rows = num_rows(n)
    x, base = tensor("x", (rows, width), dtype), tensor("base", (1, 1, width), base_dtype)
    out = compute(
        (rows, width), lambda i, c: _decay_of(wide(x[i, c]) + wide(base[0, 0, c])), name="out"
    )
    return computation([x, base, out])


def static_decay(num_heads: int, head_size: int, dtype: str) -> Any:
    """Compute Eagle's decays: (heads, size) of dtype -> exp(-exp(x)), (1, heads * size) float32."""
    x = tensor("x", (num_heads, head_size), dtype)
    out = compute(
        (1, num_heads * head_size),
        lambda i, c: _decay_of(wide(x[i + c // head_size, c % head_size])),
        name="out",
    )
    return computation([x, out])


def gated_head_norm(
    n: RowCount,
    num_heads: int,
    head_dim: int,
    dtype: str,
    weight_dtype: str,
    eps: float,
    is_group_norm: bool,
) -> Any:
    """Normalise each head, scale, multiply with silu of a gate: x (n, heads * dim) float32, gate
    (n, heads * dim) of dtype -> (n, heads * dim) of dtype.

    A group norm centers, and has weight and bias (heads * dim) (RWKV); else it is a root mean
    square norm with weights (dim) for every head. They are of weight_dtype.
    """
    rows, width = num_rows(n), num_heads * head_dim
    items = width if is_group_norm else head_dim
    x = tensor("x", (rows, width), "float32")
    gate = tensor("gate", (rows, width), dtype)
    weight = tensor("weight", (items,), weight_dtype)
    bias = [tensor("bias", (items,), weight_dtype)] if is_group_norm else []
    k, j, heads = summed(head_dim), summed(head_dim), (rows, num_heads)
    total = compute(heads, lambda i, h: te.sum(x[i, h * head_dim + k], k), name="total")

    def centered(i: Any, c: Any) -> Any:
        return x[i, c] - total[i, c // head_dim] / constant(head_dim) if bias else x[i, c]

    def square(i: Any, h: Any) -> Any:
        rest = x[i, h * head_dim + j]
        if bias:
            rest = rest - total[i, h] / constant(head_dim)
        return te.sum(rest * rest, j)

    squares = compute(heads, square, name="squares")

    def item(i: Any, c: Any) -> Any:
        factor = tirx.rsqrt(squares[i, c // head_dim] / constant(head_dim) + constant(eps))
        value = centered(i, c) * factor * wide(weight[c % items])
        if bias:
            value = value + wide(bias[0][c])
        return narrow(value * ACTIVATIONS["silu"](wide(gate[i, c])), dtype)

    return computation([x, gate, weight, *bias, compute((rows, width), item, name="out")])


def sigmoid_mul(
    n: RowCount, width: int, part: int, stride: int, offset: int, gate_width: int, dtype: str
) -> Any:
    """Gate parts of rows: x (n, width), gates (n, gate_width) -> x * sigmoid(gate).

    The gates of a part begin at column (its number) * stride + offset.
    """
    rows = num_rows(n)
    x, gate = tensor("x", (rows, width), dtype), tensor("gate", (rows, gate_width), dtype)

    def item(i: Any, c: Any) -> Any:
        argument = wide(gate[i, c // part * stride + offset + c % part])
        return narrow(wide(x[i, c]) / (constant(1) + tirx.exp(-argument)), dtype)

    return computation([x, gate, compute((rows, width), item, name="out")])


def drop_gates(n: RowCount, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Leave out the gates behind each query head: (n, 2 * heads * dim + 2 * kv_heads * dim) with
    [q; gate] of each head, k, v -> [q; k; v].
    """
    rows, width, rest = num_rows(n), num_heads * head_dim, 2 * num_kv_heads * head_dim
    x = tensor("x", (rows, 2 * width + rest), dtype)

    def item(i: Any, c: Any) -> Any:
        query = c // head_dim * (2 * head_dim) + c % head_dim
        return x[i, tirx.if_then_else(c < width, query, c + width)]

    return computation([x, compute((rows, width + rest), item, name="out")])
