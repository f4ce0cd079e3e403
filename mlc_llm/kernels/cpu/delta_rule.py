"""The gated delta rule of Qwen3-Next and Qwen3.5, token after token.

Arguments that say where sequences and their states are: see `recurrence.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.recurrence import TILE
from mlc_llm.kernels.cpu.vector_math import multiply_add, span, splat, vector_lanes


@dataclass(frozen=True)
class DeltaShape:
    """Heads of a gated delta rule: each key head serves num_heads / num_key_heads value heads."""

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Columns of [q; k; v]."""
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim


def gated_delta_rule(shape: DeltaShape, dtype: str) -> Any:
    """Run the gated delta rule: qkv (n, width) float32 -> (n, heads * value_dim) float32.

    Yang et al. 2024 (Gated DeltaNet), section 3.1: for each head, with the state S (key_dim,
    value_dim), q and k normalised to length 1 and q divided by sqrt(key_dim),

        S = exp(g) * S;  S = S + beta * k (v - S^T k)^T;  out = S^T q

    with beta = sigmoid(b) and g = -exp(a_log) * softplus(a + dt_bias). a, b (n, heads) float32;
    a_log, dt_bias (heads). state (slots, heads, key_dim, value_dim) float32.
    """
    num_heads, key_dim, value_dim = shape.num_heads, shape.key_dim, shape.value_dim
    lanes = vector_lanes(value_dim)
    tile = min(value_dim, TILE)
    while value_dim % tile:
        tile //= 2
    vectors, tiles = tile // lanes, value_dim // tile
    shared = num_heads // shape.num_key_heads
    k_start = shape.num_key_heads * key_dim
    v_start = 2 * k_start
    key_lanes = vector_lanes(key_dim)

    @T.macro
    def normalise(qkv: T.handle, row: T.int32, base: T.int32, unit: T.handle, scale: float) -> None:
        """unit = the head that starts at `base`, divided by its length and times `scale`."""
        factor = T.alloc_buffer((1,), "float32")
        factor[0] = T.float32(0)
        for i in T.serial(key_dim):
            factor[0] = multiply_add(qkv[row, base + i], qkv[row, base + i], factor[0], 1)
        factor[0] = T.float32(scale) / T.sqrt(factor[0] + T.float32(1e-6))
        for i in T.serial(key_dim // key_lanes):
            unit[span(i * key_lanes, key_lanes)] = qkv[
                row, span(base + i * key_lanes, key_lanes)
            ] * splat(factor[0], key_lanes)

    @T.macro
    def one_tile(
        qkv: T.handle,
        a: T.handle,
        b: T.handle,
        a_log: T.handle,
        dt_bias: T.handle,
        state: T.handle,
        out: T.handle,
        slot: T.int32,
        first: T.int32,
        count: T.int32,
        position: T.int32,
        h: T.int32,
        column: T.int32,
    ) -> None:
        q = T.alloc_buffer((key_dim,), "float32")
        k = T.alloc_buffer((key_dim,), "float32")
        gate = T.alloc_buffer((3,), "float32")  # time step, decay, beta
        change = T.alloc_buffer((tile,), "float32")
        total = T.alloc_buffer((tile,), "float32")
        if position == 0:
            for i in T.serial(key_dim):
                for j in T.unroll(vectors):
                    state[slot, h, i, span(column + j * lanes, lanes)] = splat(T.float32(0), lanes)
        for t in T.serial(count):
            normalise(qkv, first + t, h // shared * key_dim, q, key_dim**-0.5)
            normalise(qkv, first + t, k_start + h // shared * key_dim, k, 1.0)
            gate[0] = a[first + t, h] + T.Cast("float32", dt_bias[h])
            gate[0] = T.max(gate[0], T.float32(0)) + T.log(
                T.float32(1) + T.exp(T.float32(0) - T.abs(gate[0]))
            )
            gate[1] = T.exp(T.float32(0) - T.exp(T.Cast("float32", a_log[h])) * gate[0])
            gate[2] = T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - b[first + t, h]))
            for j in T.unroll(vectors):
                change[span(j * lanes, lanes)] = splat(T.float32(0), lanes)
                total[span(j * lanes, lanes)] = splat(T.float32(0), lanes)
            for i in T.serial(key_dim):
                for j in T.unroll(vectors):
                    change[span(j * lanes, lanes)] = multiply_add(
                        splat(k[i], lanes),
                        state[slot, h, i, span(column + j * lanes, lanes)],
                        change[span(j * lanes, lanes)],
                        lanes,
                    )
            for j in T.unroll(vectors):
                change[span(j * lanes, lanes)] = multiply_add(
                    splat(T.float32(0) - gate[1], lanes),
                    change[span(j * lanes, lanes)],
                    qkv[first + t, span(v_start + h * value_dim + column + j * lanes, lanes)],
                    lanes,
                ) * splat(gate[2], lanes)
            for i in T.serial(key_dim):
                for j in T.unroll(vectors):
                    state[slot, h, i, span(column + j * lanes, lanes)] = multiply_add(
                        splat(gate[1], lanes),
                        state[slot, h, i, span(column + j * lanes, lanes)],
                        splat(k[i], lanes) * change[span(j * lanes, lanes)],
                        lanes,
                    )
                    total[span(j * lanes, lanes)] = multiply_add(
                        splat(q[i], lanes),
                        state[slot, h, i, span(column + j * lanes, lanes)],
                        total[span(j * lanes, lanes)],
                        lanes,
                    )
            for j in T.unroll(vectors):
                out[first + t, span(h * value_dim + column + j * lanes, lanes)] = total[
                    span(j * lanes, lanes)
                ]

    @T.prim_func(private=True, s_tir=True)
    def gated_delta_rule_kernel(
        qkv_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        a_log: T.Buffer((num_heads,), dtype),
        dt_bias: T.Buffer((num_heads,), dtype),
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        batch = T.int32()
        num_starts = T.int32()
        num_slots = T.int32()
        qkv = T.match_buffer(qkv_handle, (n, shape.width), "float32")
        a = T.match_buffer(a_handle, (n, num_heads), "float32")
        b = T.match_buffer(b_handle, (n, num_heads), "float32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (batch,), "int32")
        state = T.match_buffer(state_handle, (num_slots, num_heads, key_dim, value_dim), "float32")
        out = T.match_buffer(out_handle, (n, num_heads * value_dim), "float32")
        for task in T.parallel(batch * num_heads * tiles):
            one_tile(
                qkv,
                a,
                b,
                a_log,
                dt_bias,
                state,
                out,
                slots[task // (num_heads * tiles)],
                query_start[task // (num_heads * tiles)],
                query_start[task // (num_heads * tiles) + 1]
                - query_start[task // (num_heads * tiles)],
                positions[query_start[task // (num_heads * tiles)]],
                task // tiles % num_heads,
                task % tiles * tile,
            )

    return gated_delta_rule_kernel
