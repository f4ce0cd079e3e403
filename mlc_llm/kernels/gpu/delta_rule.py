"""The gated delta rule of Qwen3-Next and Qwen3.5 on GPUs, token after token.

Arguments that say where sequences and their states are: see `recurrence.py`.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.kernels.gpu.state_grid import StateGrid, load_items, load_state, store_state

_EPS = 1e-6  # beside squared lengths of queries and keys


def gated_delta_rule(shape: DeltaShape, dtype: str, gate_dtype: str) -> Any:
    """Run the gated delta rule: qkv (n, width), a, b (n, heads) of dtype, a_log, dt_bias (heads) of
    gate_dtype -> (n, heads * value_dim) float32. What it computes is said in
    `kernels.cpu.delta_rule`. state (slots, heads, key_dim, value_dim) float32.

    With u = decay * S^T k and the change beta * (v - u), the new state's S^T q is that of the old
    one times the decay, plus (k . q) * change: one sum over all rows at a time gives both.
    """
    num_heads, key_dim, value_dim = shape.num_heads, shape.key_dim, shape.value_dim
    grid = StateGrid(key_dim, value_dim)
    row_step, deep, across = grid.row_step, grid.deep, grid.across
    lanes = math.gcd(grid.lanes, shape.width)
    shared = num_heads // shape.num_key_heads
    k_start = shape.num_key_heads * key_dim
    v_start = 2 * k_start

    @T.macro
    def tabulate_gates(
        gate: T.handle,
        a: T.handle,
        b: T.handle,
        a_log: T.handle,
        dt_bias: T.handle,
        gates: T.handle,
        thread: T.int32,
        row: T.int32,
        h: T.int32,
    ) -> None:
        """gates = decays and betas of a head, those of a token for each thread."""
        gate[0] = T.Cast("float32", a[row, h]) + T.Cast("float32", dt_bias[h])
        # softplus
        gate[0] = T.max(gate[0], T.float32(0)) + T.log(
            T.float32(1) + T.exp(T.float32(0) - T.abs(gate[0]))
        )
        gates[thread * 2] = T.exp(T.float32(0) - T.exp(T.Cast("float32", a_log[h])) * gate[0])
        gates[thread * 2 + 1] = T.float32(1) / (
            T.float32(1) + T.exp(T.float32(0) - T.Cast("float32", b[row, h]))
        )

    @T.prim_func(private=True, s_tir=True)
    def gated_delta_rule_kernel(
        qkv_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        a_log: T.Buffer((num_heads,), gate_dtype),
        dt_bias: T.Buffer((num_heads,), gate_dtype),
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, num_starts, num_slots = T.int32(), T.int32(), T.int32(), T.int32()
        qkv = T.match_buffer(qkv_handle, (n, shape.width), dtype)
        a = T.match_buffer(a_handle, (n, num_heads), dtype)
        b = T.match_buffer(b_handle, (n, num_heads), dtype)
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (batch,), "int32")
        state = T.match_buffer(state_handle, (num_slots, num_heads, key_dim, value_dim), "float32")
        out = T.match_buffer(out_handle, (n, num_heads * value_dim), "float32")
        for s in T.thread_binding(batch, thread="blockIdx.x"):
            for by in T.thread_binding(num_heads * grid.tiles, thread="blockIdx.y"):
                for thread in T.thread_binding(grid.threads, thread="threadIdx.x"):
                    held = T.alloc_buffer((row_step,), "float32", scope="local")
                    # S^T k and S^T q of the column; k . k, q . q and k . q.
                    dot = T.alloc_buffer((5,), "float32", scope="local")
                    k_items = T.alloc_buffer((row_step,), dtype, scope="local")
                    q_items = T.alloc_buffer((row_step,), dtype, scope="local")
                    pair = T.alloc_buffer((2,), "float32", scope="local")  # items of k and of q
                    gate = T.alloc_buffer((2,), "float32", scope="local")
                    change = T.alloc_buffer((1,), "float32", scope="local")
                    span = T.alloc_buffer((2,), "int32", scope="local")
                    # In turns, so that one token's sums are read while the next one's are written.
                    partial = T.alloc_buffer((2 * deep * across * 2,), "float32", scope="shared")
                    lengths = T.alloc_buffer((2 * deep * 3,), "float32", scope="shared")
                    gates = T.alloc_buffer((2 * grid.threads,), "float32", scope="shared")
                    h: T.let = by // grid.tiles
                    x: T.let = thread % across
                    y: T.let = thread // across
                    column: T.let = by % grid.tiles * across + x
                    # Columns past the end compute what is there already, and write nothing.
                    c: T.let = T.min(column, value_dim - 1)
                    first: T.let = h // shared * key_dim + y * row_step
                    span[0] = query_start[s]
                    span[1] = query_start[s + 1]
                    load_state(
                        *(state, held, slots[s], h, y * row_step, c, row_step),
                        positions[query_start[s]] == 0,
                    )
                    for t in T.serial(span[1] - span[0]):
                        row: T.let = span[0] + t
                        if t % grid.threads == 0:
                            T.tvm_storage_sync("shared")
                            if row + thread < span[1]:
                                tabulate_gates(
                                    *(gate, a, b, a_log, dt_bias, gates, thread, row + thread, h)
                                )
                        load_items(qkv, k_items, row, k_start + first, row_step, lanes)
                        load_items(qkv, q_items, row, first, row_step, lanes)
                        for i in T.unroll(5):
                            dot[i] = T.float32(0)
                        for j in T.unroll(row_step):
                            pair[0] = T.Cast("float32", k_items[j])
                            pair[1] = T.Cast("float32", q_items[j])
                            dot[0] = dot[0] + held[j] * pair[0]
                            dot[1] = dot[1] + held[j] * pair[1]
                            dot[2] = dot[2] + pair[0] * pair[0]
                            dot[3] = dot[3] + pair[1] * pair[1]
                            dot[4] = dot[4] + pair[0] * pair[1]
                        for i in T.unroll(2):
                            partial[((t % 2 * deep + y) * 2 + i) * across + x] = dot[i]
                        if x == 0:
                            for i in T.unroll(3):
                                lengths[(t % 2 * deep + y) * 3 + i] = dot[2 + i]
                        T.tvm_storage_sync("shared")
                        for i in T.unroll(2):
                            gate[i] = gates[t % grid.threads * 2 + i]
                        for i in T.unroll(5):
                            dot[i] = T.float32(0)
                        for d in T.unroll(deep):
                            for i in T.unroll(2):
                                dot[i] = dot[i] + partial[((t % 2 * deep + d) * 2 + i) * across + x]
                            for i in T.unroll(3):
                                dot[2 + i] = dot[2 + i] + lengths[(t % 2 * deep + d) * 3 + i]
                        dot[2] = T.float32(1) / T.sqrt(dot[2] + T.float32(_EPS))
                        dot[3] = T.float32(key_dim**-0.5) / T.sqrt(dot[3] + T.float32(_EPS))
                        change[0] = gate[1] * (
                            T.Cast("float32", qkv[row, v_start + h * value_dim + c])
                            - gate[0] * dot[2] * dot[0]
                        )
                        change[0] = change[0] * dot[2]  # what a key that is no unit yet is to add
                        for j in T.unroll(row_step):
                            held[j] = gate[0] * held[j] + T.Cast("float32", k_items[j]) * change[0]
                        if y == 0 and column < value_dim:
                            out[row, h * value_dim + c] = dot[3] * (
                                gate[0] * dot[1] + dot[4] * change[0]
                            )
                    if column < value_dim:
                        store_state(state, held, slots[s], h, y * row_step, c, row_step)

    return gated_delta_rule_kernel
