"""Pieces of multi-head latent attention (DeepSeek-AI 2024, section 2.1) on a compressed cache.

A cached token is one key/value head [rope; latent]: what is rotated, then the latent vector that
keys and values of all heads are made of. Queries are brought into the latent space instead, and
what they attend to is brought out of it. Knows neither pages nor attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    lane_dtype,
    multiply_add,
    reduce_sum,
    span,
    splat,
    vector_lanes,
)


@dataclass(frozen=True)
class LatentShape:
    """Sizes of the attention: heads, latent vector, rotated and other part of a query, value."""

    num_heads: int
    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Return the size of a cached head."""
        return self.rope_dim + self.rank

    @property
    def query_dim(self) -> int:
        """Return the size of a head's query before it enters the latent space."""
        return self.nope_dim + self.rope_dim


def head_linear(
    num_heads: int,
    out_features: int,
    in_features: int,
    stride: int,
    offset: int,
    weight_dtype: str,
) -> Any:
    """Multiply each head with a matrix of its own: x (n, heads * stride) float32,
    weight (heads, out, in) -> (n, heads * out) float32.

    Head h reads the `in` items from h * stride + offset on.
    """
    lanes = vector_lanes(in_features)
    vector = lane_dtype("float32", lanes)
    width, out_width = num_heads * stride, num_heads * out_features

    @T.prim_func(private=True, s_tir=True)
    def head_linear_kernel(
        x_handle: T.handle, weight_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        weight = T.match_buffer(weight_handle, (num_heads, out_features, in_features), weight_dtype)
        out = T.match_buffer(out_handle, (n, out_width), "float32")
        for h in T.parallel(num_heads):
            total = T.alloc_buffer((lanes,), "float32")
            for o in T.serial(out_features):
                for t in T.serial(n):
                    total[span(0, lanes)] = splat(T.float32(0), lanes)
                    for i in T.serial(in_features // lanes):
                        total[span(0, lanes)] = multiply_add(
                            x[t, span(h * stride + offset + i * lanes, lanes)],
                            T.Cast(vector, weight[h, o, span(i * lanes, lanes)]),
                            total[span(0, lanes)],
                            lanes,
                        )
                    out[t, h * out_features + o] = reduce_sum(total[span(0, lanes)], lanes)

    return head_linear_kernel


def join_latent(shape: LatentShape) -> Any:
    """Lay out what attention takes: q (n, heads * query_dim) as [nope; rope] each, latent_q
    (n, heads * rank), latent (n, rank), kv_a (n, rank + rope), all float32
    -> (n, (heads + 2) * head_dim): a query [rope; latent] each, the key, and the value like it.
    """
    heads, rank, rope, nope = shape.num_heads, shape.rank, shape.rope_dim, shape.nope_dim
    head_dim, query_dim = shape.head_dim, shape.query_dim

    @T.prim_func(private=True, s_tir=True)
    def join_latent_kernel(
        q_handle: T.handle,
        latent_q_handle: T.handle,
        latent_handle: T.handle,
        kv_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        q = T.match_buffer(q_handle, (n, heads * query_dim), "float32")
        latent_q = T.match_buffer(latent_q_handle, (n, heads * rank), "float32")
        latent = T.match_buffer(latent_handle, (n, rank), "float32")
        kv = T.match_buffer(kv_handle, (n, rank + rope), "float32")
        out = T.match_buffer(out_handle, (n, (heads + 2) * head_dim), "float32")
        for t in T.serial(n):
            for h in T.serial(heads):
                for i in T.serial(rope):
                    out[t, h * head_dim + i] = q[t, h * query_dim + nope + i]
                for i in T.serial(rank):
                    out[t, h * head_dim + rope + i] = latent_q[t, h * rank + i]
            for side in T.serial(2):
                for i in T.serial(rope):
                    out[t, (heads + side) * head_dim + i] = kv[t, rank + i]
                for i in T.serial(rank):
                    out[t, (heads + side) * head_dim + rope + i] = latent[t, i]

    return join_latent_kernel


def take_columns(width: int, start: int, count: int) -> Any:
    """Take neighbouring columns: (n, width) float32 -> (n, count)."""

    @T.prim_func(private=True, s_tir=True)
    def take_columns_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        out = T.match_buffer(out_handle, (n, count), "float32")
        for t in T.serial(n):
            for i in T.serial(count):
                out[t, i] = x[t, start + i]

    return take_columns_kernel
