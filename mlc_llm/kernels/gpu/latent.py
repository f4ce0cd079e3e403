"""Pieces of multi-head latent attention on GPUs, as computations without a schedule.

What they are for is said in `kernels.cpu.latent`; attention itself is that over pages.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from mlc_llm.kernels.cpu.latent import LatentShape
from mlc_llm.kernels.gpu.rows import (
    RowCount,
    computation,
    compute,
    narrow,
    num_rows,
    summed,
    tensor,
    wide,
)


def head_columns(
    n: RowCount, num_heads: int, stride: int, offset: int, count: int, dtype: str
) -> Any:
    """Take columns of heads: x (n, heads * stride) -> (n, heads, count), those of each head from
    `offset` on.
    """
    rows = num_rows(n)
    x = tensor("x", (rows, num_heads * stride), dtype)
    shape = (rows, num_heads, count)
    out = compute(shape, lambda t, h, i: x[t, h * stride + offset + i], name="out")
    return computation([x, out])


def head_linear(
    n: RowCount, num_heads: int, out_features: int, in_features: int, dtype: str
) -> Any:
    """Multiply each head with a matrix of its own: x (n, heads, in), weight (heads, out, in)
    -> (n, heads, out). Sums are float32.
    """
    rows = num_rows(n)
    x = tensor("x", (rows, num_heads, in_features), dtype)
    weight = tensor("weight", (num_heads, out_features, in_features), dtype)
    k, is_result = summed(in_features), dtype == "float32"
    shape = (rows, num_heads, out_features)
    total = compute(
        shape,
        lambda t, h, o: te.sum(wide(x[t, h, k]) * wide(weight[h, o, k]), k),
        name="out" if is_result else "total",
    )
    if is_result:
        return computation([x, weight, total])
    out = compute(shape, lambda t, h, o: narrow(total[t, h, o], dtype), name="out")
    return computation([x, weight, out])


def join_latent(n: RowCount, shape: LatentShape, dtype: str) -> Any:
    """Lay out what attention takes: q (n, heads * query_dim) as [nope; rope] each, latent_q
    (n, heads, rank), latent (n, rank), kv_a (n, rank + rope)
    -> (n, (heads + 2) * head_dim): a query [rope; latent] each, the key, and the value like it.
    """
    heads, rank, rope, nope = shape.num_heads, shape.rank, shape.rope_dim, shape.nope_dim
    head_dim, query_dim, rows = shape.head_dim, shape.query_dim, num_rows(n)
    q = tensor("q", (rows, heads * query_dim), dtype)
    latent_q = tensor("latent_q", (rows, heads, rank), dtype)
    latent = tensor("latent", (rows, rank), dtype)
    kv_a = tensor("kv_a", (rows, rank + rope), dtype)

    def item(t: Any, c: Any) -> Any:
        h, i = c // head_dim, c % head_dim
        return tirx.if_then_else(
            h < heads,
            tirx.if_then_else(i < rope, q[t, h * query_dim + nope + i], latent_q[t, h, i - rope]),
            tirx.if_then_else(i < rope, kv_a[t, rank + i], latent[t, i - rope]),
        )

    out = compute((rows, (heads + 2) * head_dim), item, name="out")
    return computation([q, latent_q, latent, kv_a, out])
