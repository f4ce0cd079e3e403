"""From logits to tokens on a GPU: in-place changes of logits, softmax, and the draw.

Threads are bound by hand: what is written where depends on data, or many threads share a row.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

# Threads of a block; every GPU has so many.
THREADS = 256
# Low enough for no chance; WGSL is written with seven digits.
_LOWEST = -3.402823e38


def apply_logit_bias() -> Any:
    """Add: logits (b, v) float32 in place, rows (t), tokens (t) int32, biases (t) float32."""

    @T.prim_func(private=True, s_tir=True)
    def logit_bias_kernel(
        logits_handle: T.handle,
        rows_handle: T.handle,
        tokens_handle: T.handle,
        bias_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        v = T.int32()
        t = T.int32()
        logits = T.match_buffer(logits_handle, (b, v), "float32")
        rows = T.match_buffer(rows_handle, (t,), "int32")
        tokens = T.match_buffer(tokens_handle, (t,), "int32")
        bias = T.match_buffer(bias_handle, (t,), "float32")
        for block in T.thread_binding((t + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                i: T.let = block * THREADS + thread
                if i < t:
                    logits[rows[i], tokens[i]] = logits[rows[i], tokens[i]] + bias[i]

    return logit_bias_kernel


def apply_penalty() -> Any:
    """Penalise what was said: logits (b, v) float32 in place, rows (s) int32 of sequences,
    sequence_of (t), tokens (t), counts (t) int32, penalties (s, 3) float32: presence, frequency,
    repetition.
    """

    @T.prim_func(private=True, s_tir=True)
    def penalty_kernel(
        logits_handle: T.handle,
        rows_handle: T.handle,
        sequence_handle: T.handle,
        tokens_handle: T.handle,
        counts_handle: T.handle,
        penalties_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        v = T.int32()
        s = T.int32()
        t = T.int32()
        logits = T.match_buffer(logits_handle, (b, v), "float32")
        rows = T.match_buffer(rows_handle, (s,), "int32")
        sequence_of = T.match_buffer(sequence_handle, (t,), "int32")
        tokens = T.match_buffer(tokens_handle, (t,), "int32")
        counts = T.match_buffer(counts_handle, (t,), "int32")
        penalties = T.match_buffer(penalties_handle, (s, 3), "float32")
        for block in T.thread_binding((t + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                i: T.let = block * THREADS + thread
                if i < t:
                    row: T.let = rows[sequence_of[i]]
                    found: T.let = (
                        logits[row, tokens[i]]
                        - penalties[sequence_of[i], 0]
                        - T.Cast("float32", counts[i]) * penalties[sequence_of[i], 1]
                    )
                    logits[row, tokens[i]] = T.if_then_else(
                        found > T.float32(0),
                        found / penalties[sequence_of[i], 2],
                        found * penalties[sequence_of[i], 2],
                    )

    return penalty_kernel


def apply_bitmask() -> Any:
    """Forbid: logits (b, v) float32 in place, rows (s) int32, mask (s, ceil(v / 32)) int32.

    The token of a bit that is 0 gets the lowest number there is.
    """

    @T.prim_func(private=True, s_tir=True)
    def bitmask_kernel(
        logits_handle: T.handle, rows_handle: T.handle, mask_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        v = T.int32()
        s = T.int32()
        logits = T.match_buffer(logits_handle, (b, v), "float32")
        rows = T.match_buffer(rows_handle, (s,), "int32")
        mask = T.match_buffer(mask_handle, (s, (v + 31) // 32), "int32")
        for block in T.thread_binding((s * v + THREADS - 1) // THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                if block * THREADS + thread < s * v:
                    i: T.let = (block * THREADS + thread) // v
                    token: T.let = (block * THREADS + thread) % v
                    logits[rows[i], token] = T.if_then_else(
                        T.bitwise_and(T.shift_right(mask[i, token // 32], token % 32), 1) == 1,
                        logits[rows[i], token],
                        T.float32(_LOWEST),
                    )

    return bitmask_kernel


def softmax_with_temperature() -> Any:
    """Softmax: logits (b, 1, v) float32, temperature (b) float32, above 0 -> (b, 1, v)."""

    @T.prim_func(private=True, s_tir=True)
    def softmax_kernel(
        logits_handle: T.handle, temperature_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        v = T.int32()
        logits = T.match_buffer(logits_handle, (b, 1, v), "float32")
        temperature = T.match_buffer(temperature_handle, (b,), "float32")
        out = T.match_buffer(out_handle, (b, 1, v), "float32")
        for row in T.thread_binding(b, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                partial = T.alloc_buffer((THREADS,), "float32", scope="shared")
                found = T.alloc_buffer((2,), "float32", scope="local")
                found[0] = T.float32(_LOWEST)
                for i in T.serial((v + THREADS - 1) // THREADS):
                    if i * THREADS + thread < v:
                        found[0] = T.max(found[0], logits[row, 0, i * THREADS + thread])
                partial[thread] = found[0]
                T.tvm_storage_sync("shared")
                for step in T.unroll(8):
                    if thread < T.shift_right(128, step):
                        partial[thread] = T.max(
                            partial[thread], partial[thread + T.shift_right(128, step)]
                        )
                    T.tvm_storage_sync("shared")
                found[0] = partial[0]
                found[1] = T.float32(0)
                T.tvm_storage_sync("shared")
                for i in T.serial((v + THREADS - 1) // THREADS):
                    if i * THREADS + thread < v:
                        found[1] = found[1] + T.exp(
                            (logits[row, 0, i * THREADS + thread] - found[0]) / temperature[row]
                        )
                partial[thread] = found[1]
                T.tvm_storage_sync("shared")
                for step in T.unroll(8):
                    if thread < T.shift_right(128, step):
                        partial[thread] = (
                            partial[thread] + partial[thread + T.shift_right(128, step)]
                        )
                    T.tvm_storage_sync("shared")
                for i in T.serial((v + THREADS - 1) // THREADS):
                    if i * THREADS + thread < v:
                        out[row, 0, i * THREADS + thread] = (
                            T.exp(
                                (logits[row, 0, i * THREADS + thread] - found[0]) / temperature[row]
                            )
                            / partial[0]
                        )

    return softmax_kernel


def sample_with_top_p() -> Any:
    """Draw: probabilities (b, v) float32, falling, their tokens (b, v) int32, uniform (s) float32,
    rows (s) int32, top_p (b) float32 -> tokens (s) int32.

    A row's candidates are its first tokens whose probabilities reach top_p in sum; one of them is
    chosen where the sum passes uniform times their own. The first is always one.
    """

    @T.prim_func(private=True, s_tir=True)
    def draw_kernel(
        probs_handle: T.handle,
        order_handle: T.handle,
        uniform_handle: T.handle,
        rows_handle: T.handle,
        top_p_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        v = T.int32()
        s = T.int32()
        probs = T.match_buffer(probs_handle, (b, v), "float32")
        order = T.match_buffer(order_handle, (b, v), "int32")
        uniform = T.match_buffer(uniform_handle, (s,), "float32")
        rows = T.match_buffer(rows_handle, (s,), "int32")
        top_p = T.match_buffer(top_p_handle, (b,), "float32")
        out = T.match_buffer(out_handle, (s,), "int32")
        for draw in T.thread_binding(s, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                sums = T.alloc_buffer((THREADS,), "float32", scope="shared")
                # sum so far, sum of the candidates, what was drawn of it, sum with the next part
                state = T.alloc_buffer((4,), "float32", scope="local")
                at = T.alloc_buffer((3,), "int32", scope="local")
                row: T.let = rows[draw]
                # Every thread sums a part of the row.
                part: T.let = (v + THREADS - 1) // THREADS
                state[0] = T.float32(0)
                for i in T.serial(part):
                    if thread * part + i < v:
                        state[0] = state[0] + probs[row, thread * part + i]
                sums[thread] = state[0]
                T.tvm_storage_sync("shared")
                if thread == 0:
                    # First the sum of the candidates: the part where it is reached, then there.
                    state[0] = T.float32(0)
                    at[0] = 0
                    for i in T.serial(THREADS - 1):
                        state[3] = state[0] + sums[i]
                        if at[0] == i and state[3] < top_p[row]:
                            state[0] = state[3]
                            at[0] = i + 1
                    state[1] = state[0]
                    for i in T.serial(part):
                        if at[0] * part + i < v and state[1] < top_p[row]:
                            state[1] = state[1] + probs[row, at[0] * part + i]
                    # Then where the sum passes what was drawn of it, in the same way.
                    state[2] = uniform[draw] * state[1]
                    state[0] = T.float32(0)
                    at[0] = 0
                    for i in T.serial(THREADS - 1):
                        state[3] = state[0] + sums[i]
                        if at[0] == i and state[3] <= state[2]:
                            state[0] = state[3]
                            at[0] = i + 1
                    at[1] = 0
                    at[2] = 0
                    for i in T.serial(part):
                        if at[0] * part + i < v and state[0] <= state[2]:
                            state[0] = state[0] + probs[row, at[0] * part + i]
                            # Tokens of no probability are behind all others.
                            if probs[row, at[0] * part + i] > T.float32(0):
                                at[1] = at[0] * part + i
                                at[2] = 1
                    out[draw] = T.if_then_else(at[2] == 1, order[row, at[1]], order[row, 0])

    return draw_kernel
