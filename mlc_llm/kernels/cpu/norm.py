"""Layer norm, and norms of query and key heads inside the fused q, k and v."""

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

# Below this many rows a parallel launch costs more than it saves (benchmarks/kernels.py).
_SERIAL_ROWS = 12


def statistics(width: int, eps: float, is_centered: bool) -> Any:
    """Return a macro (x, found, row, start): found = mean (0 unless centered), 1 / deviation."""
    lanes = vector_lanes(width)

    @T.macro
    def compute(x: T.handle, found: T.handle, row: T.int32, start: T.int32) -> None:
        total = T.alloc_buffer((lanes,), "float32")
        rest = T.alloc_buffer((lanes,), "float32")
        found[0] = T.float32(0)
        if is_centered:
            total[span(0, lanes)] = splat(T.float32(0), lanes)
            for i in T.serial(width // lanes):
                total[span(0, lanes)] = (
                    total[span(0, lanes)] + x[row, span(start + i * lanes, lanes)]
                )
            found[0] = reduce_sum(total[span(0, lanes)], lanes) / T.float32(width)
        total[span(0, lanes)] = splat(T.float32(0), lanes)
        for i in T.serial(width // lanes):
            rest[span(0, lanes)] = x[row, span(start + i * lanes, lanes)] - splat(found[0], lanes)
            total[span(0, lanes)] = multiply_add(
                rest[span(0, lanes)], rest[span(0, lanes)], total[span(0, lanes)], lanes
            )
        found[1] = T.float32(1) / T.sqrt(
            reduce_sum(total[span(0, lanes)], lanes) / T.float32(width) + T.float32(eps)
        )

    return compute


def layer_norm(hidden_size: int, weight_dtype: str, eps: float, adds_one: bool) -> Any:
    """Normalise rows: x (n, h) float32, weight (h), bias (h) -> (n, h) float32.

    Ba et al. 2016: (x - mean) / sqrt(variance + eps) * weight + bias; adds_one: * (1 + weight).
    """
    lanes = vector_lanes(hidden_size)
    vector = lane_dtype("float32", lanes)
    statistics_of = statistics(hidden_size, eps, is_centered=True)
    one = 1.0 if adds_one else 0.0

    @T.macro
    def normalise(
        x: T.handle, weight: T.handle, bias: T.handle, out: T.handle, row: T.int32
    ) -> None:
        found = T.alloc_buffer((2,), "float32")
        statistics_of(x, found, row, 0)
        for i in T.serial(hidden_size // lanes):
            out[row, span(i * lanes, lanes)] = multiply_add(
                (x[row, span(i * lanes, lanes)] - splat(found[0], lanes)) * splat(found[1], lanes),
                T.Cast(vector, weight[span(i * lanes, lanes)]) + splat(T.float32(one), lanes),
                T.Cast(vector, bias[span(i * lanes, lanes)]),
                lanes,
            )

    @T.prim_func(private=True, s_tir=True)
    def layer_norm_kernel(
        x_handle: T.handle, weight_handle: T.handle, bias_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, hidden_size), "float32")
        weight = T.match_buffer(weight_handle, (hidden_size,), weight_dtype)
        bias = T.match_buffer(bias_handle, (hidden_size,), weight_dtype)
        out = T.match_buffer(out_handle, (n, hidden_size), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                normalise(x, weight, bias, out, row)
        else:
            for row in T.parallel(n):
                normalise(x, weight, bias, out, row)

    return layer_norm_kernel


@dataclass(frozen=True)
class HeadNorm:
    """Norms of queries and keys inside rows [q; k; v].

    q and k are cut into `num_q` and `num_k` parts, heads or the whole, each normalised by itself;
    the v_width items that follow stay as they are. q_items, k_items: extents of the weights, which
    repeat over the parts. is_centered: layer norm without shift, else root mean square.
    """

    num_q: int
    q_width: int
    q_items: int
    num_k: int
    k_width: int
    k_items: int
    v_width: int
    eps: float
    is_centered: bool = False

    @property
    def width(self) -> int:
        """Return the items of a row."""
        return self.num_q * self.q_width + self.num_k * self.k_width + self.v_width


def norm_heads(shape: HeadNorm, weight_dtype: str) -> Any:
    """Normalise queries and keys: x (n, width) float32, q and k weights -> (n, width) float32."""
    q_width, k_width, width = shape.q_width, shape.k_width, shape.width
    k_start = shape.num_q * q_width
    v_start = k_start + shape.num_k * k_width
    normalise_q = _norm_of_part(q_width, shape.eps, shape.is_centered)
    normalise_k = _norm_of_part(k_width, shape.eps, shape.is_centered)

    @T.macro
    def one_row(x: T.handle, q: T.handle, k: T.handle, out: T.handle, row: T.int32) -> None:
        for part in T.serial(shape.num_q):
            normalise_q(x, q, out, row, part * q_width, part * q_width % shape.q_items)
        for part in T.serial(shape.num_k):
            normalise_k(x, k, out, row, k_start + part * k_width, part * k_width % shape.k_items)
        for i in T.serial(shape.v_width):
            out[row, v_start + i] = x[row, v_start + i]

    @T.prim_func(private=True, s_tir=True)
    def norm_heads_kernel(
        x_handle: T.handle, q_handle: T.handle, k_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        q = T.match_buffer(q_handle, (shape.q_items,), weight_dtype)
        k = T.match_buffer(k_handle, (shape.k_items,), weight_dtype)
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _SERIAL_ROWS:
            for row in T.serial(n):
                one_row(x, q, k, out, row)
        else:
            for row in T.parallel(n):
                one_row(x, q, k, out, row)

    return norm_heads_kernel


def _norm_of_part(width: int, eps: float, is_centered: bool) -> Any:
    """Return a macro (x, weight, out, row, start, first): a part and its weights' beginning."""
    lanes = vector_lanes(width)
    vector = lane_dtype("float32", lanes)
    statistics_of = statistics(width, eps, is_centered)

    @T.macro
    def normalise(
        x: T.handle, weight: T.handle, out: T.handle, row: T.int32, start: T.int32, first: T.int32
    ) -> None:
        found = T.alloc_buffer((2,), "float32")
        statistics_of(x, found, row, start)
        for i in T.serial(width // lanes):
            out[row, span(start + i * lanes, lanes)] = (
                (x[row, span(start + i * lanes, lanes)] - splat(found[0], lanes))
                * splat(found[1], lanes)
                * T.Cast(vector, weight[span(first + i * lanes, lanes)])
            )

    return normalise
