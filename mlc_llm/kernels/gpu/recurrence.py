"""Recurrences over the tokens of each sequence on GPUs, with a state that is written in place.

Common arguments are those of `kernels.cpu.recurrence`: positions (n), query_start (b + 1) and
state_slots (b), all int32. What begins at position 0 begins with zeros. Rows have the model's
dtype, states and arithmetic are float32. Threads are bound by hand.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.gpu.state_grid import StateGrid, load_items, load_state, store_state

# Threads of a block; every GPU has so many.
THREADS = 256
# Tokens that a thread convolves, one after the other.
_TOKENS = 16


def token_shift(width: int, dtype: str) -> Any:
    """Delay by one token: x (n, width) of dtype -> (n, width), each row's predecessor.

    state (slots, width) float32 holds the last row of each sequence.
    """

    @T.prim_func(private=True, s_tir=True)
    def token_shift_kernel(
        x_handle: T.handle,
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, num_starts, num_slots = T.int32(), T.int32(), T.int32(), T.int32()
        x = T.match_buffer(x_handle, (n, width), dtype)
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (batch,), "int32")
        state = T.match_buffer(state_handle, (num_slots, width), "float32")
        out = T.match_buffer(out_handle, (n, width), dtype)
        # All rows as if they were of one sequence; then the first one of each.
        if n != batch:
            for block in T.thread_binding(
                (n * width + THREADS - 1) // THREADS, thread="blockIdx.x"
            ):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    t: T.let = (block * THREADS + thread) // width
                    i: T.let = (block * THREADS + thread) % width
                    if t + 1 < n:
                        out[t + 1, i] = x[t, i]
        for block in T.thread_binding(
            (batch * width + THREADS - 1) // THREADS, thread="blockIdx.x"
        ):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                s: T.let = (block * THREADS + thread) // width
                c: T.let = (block * THREADS + thread) % width
                if s < batch:
                    out[query_start[s], c] = T.if_then_else(
                        positions[query_start[s]] == 0,
                        T.Cast(dtype, T.float32(0)),
                        T.Cast(dtype, state[slots[s], c]),
                    )
                    state[slots[s], c] = T.Cast("float32", x[query_start[s + 1] - 1, c])

    return token_shift_kernel


def causal_conv(channels: int, taps: int, dtype: str, weight_dtype: str) -> Any:
    """Convolve each channel over time, then silu: x (n, channels) of dtype, weight (channels, 1,
    taps) -> (n, channels), out[t] = silu(sum of weight[j] * x[t - taps + 1 + j]).

    state (slots, taps - 1, channels) float32 holds the last inputs of each sequence, oldest first.
    """
    kept = taps - 1
    column_blocks = -(-channels // THREADS)

    @T.macro
    def take(
        item: T.handle,
        at: T.meta_var,
        x: T.handle,
        positions: T.handle,
        query_start: T.handle,
        slots: T.handle,
        state: T.handle,
        s: T.int32,
        place: T.int32,
        c: T.int32,
    ) -> None:
        """item[at] = the input of sequence s that is `place` rows after its first of this step."""
        if place >= 0:
            item[at] = T.Cast("float32", x[query_start[s] + place, c])
        else:
            if positions[query_start[s]] == 0:
                item[at] = T.float32(0)
            else:
                item[at] = state[slots[s], kept + place, c]

    @T.macro
    def keep(
        x: T.handle,
        positions: T.handle,
        query_start: T.handle,
        slots: T.handle,
        state: T.handle,
        s: T.int32,
        c: T.int32,
    ) -> None:
        """Keep the last inputs of sequence s; some may have been kept before."""
        last = T.alloc_buffer((kept,), "float32", scope="local")
        for j in T.unroll(kept):
            take(
                *(last, j, x, positions, query_start, slots, state),
                *(s, query_start[s + 1] - query_start[s] - kept + j, c),
            )
        for j in T.unroll(kept):
            state[slots[s], j, c] = last[j]

    @T.prim_func(private=True, s_tir=True)
    def causal_conv_kernel(
        x_handle: T.handle,
        weight: T.Buffer((channels, 1, taps), weight_dtype),
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, num_starts, num_slots = T.int32(), T.int32(), T.int32(), T.int32()
        x = T.match_buffer(x_handle, (n, channels), dtype)
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (batch,), "int32")
        state = T.match_buffer(state_handle, (num_slots, kept, channels), "float32")
        out = T.match_buffer(out_handle, (n, channels), dtype)
        for bx in T.thread_binding(n // _TOKENS + batch, thread="blockIdx.x"):
            for by in T.thread_binding(column_blocks, thread="blockIdx.y"):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    bound = T.alloc_buffer((2,), "int32", scope="local")
                    found = T.alloc_buffer((2,), "int32", scope="local")
                    item = T.alloc_buffer((2,), "float32", scope="local")
                    # The blocks of sequence s begin with number query_start[s] // _TOKENS + s.
                    bound[0] = 0
                    bound[1] = batch - 1
                    for _step in T.serial(24):
                        if bound[0] < bound[1]:
                            middle: T.let = (bound[0] + bound[1] + 1) // 2
                            if query_start[middle] // _TOKENS + middle <= bx:
                                bound[0] = middle
                            else:
                                bound[1] = middle - 1
                    s: T.let = bound[0]
                    found[0] = (bx - query_start[s] // _TOKENS - s) * _TOKENS
                    found[1] = T.min(query_start[s + 1] - query_start[s] - found[0], _TOKENS)
                    first: T.let = found[0]
                    count: T.let = found[1]
                    c: T.let = by * THREADS + thread
                    if c < channels:
                        for t in T.serial(count):
                            item[1] = T.float32(0)
                            for j in T.unroll(taps):
                                take(
                                    *(item, 0, x, positions, query_start, slots, state),
                                    *(s, first + t - kept + j, c),
                                )
                                item[1] = item[1] + item[0] * T.Cast("float32", weight[c, 0, j])
                            out[query_start[s] + first + t, c] = T.Cast(
                                dtype, item[1] / (T.float32(1) + T.exp(T.float32(0) - item[1]))
                            )
                        # Where each sequence has one token, nobody else reads what it keeps.
                        if n == batch and count > 0:
                            keep(x, positions, query_start, slots, state, s, c)
        if n != batch:
            for block in T.thread_binding(
                (batch * channels + THREADS - 1) // THREADS, thread="blockIdx.x"
            ):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    index: T.let = block * THREADS + thread
                    if index < batch * channels:
                        keep(
                            *(x, positions, query_start, slots, state),
                            *(index // channels, index % channels),
                        )

    return causal_conv_kernel


def wkv(num_heads: int, head_size: int, dtype: str, bonus_dtype: str, is_dynamic: bool) -> Any:
    """Run the linear attention of RWKV: r, k, v (n, heads * size) of dtype -> the same shape,
    float32.

    What it computes is said in `kernels.cpu.recurrence`. decay: (n, heads * size) float32, or (1,
    heads * size) for all tokens. bonus: (heads, size). state (slots, heads, size, size) float32.
    """
    grid = StateGrid(head_size, head_size)
    width, row_step, deep, across = num_heads * head_size, grid.row_step, grid.deep, grid.across
    lanes = grid.lanes

    @T.prim_func(private=True, s_tir=True)
    def wkv_kernel(
        r_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        decay_handle: T.handle,
        bonus: T.Buffer((num_heads, head_size), bonus_dtype),
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, batch, num_starts, num_slots = T.int32(), T.int32(), T.int32(), T.int32()
        num_decays = T.int32()
        r = T.match_buffer(r_handle, (n, width), dtype)
        k = T.match_buffer(k_handle, (n, width), dtype)
        v = T.match_buffer(v_handle, (n, width), dtype)
        decay = T.match_buffer(decay_handle, (num_decays, width), "float32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (batch,), "int32")
        state = T.match_buffer(
            state_handle, (num_slots, num_heads, head_size, head_size), "float32"
        )
        out = T.match_buffer(out_handle, (n, width), "float32")
        for s in T.thread_binding(batch, thread="blockIdx.x"):
            for by in T.thread_binding(num_heads * grid.tiles, thread="blockIdx.y"):
                for thread in T.thread_binding(grid.threads, thread="threadIdx.x"):
                    held = T.alloc_buffer((row_step,), "float32", scope="local")
                    r_items = T.alloc_buffer((row_step,), dtype, scope="local")
                    k_items = T.alloc_buffer((row_step,), dtype, scope="local")
                    w_items = T.alloc_buffer((row_step,), "float32", scope="local")
                    u_items = T.alloc_buffer((row_step,), bonus_dtype, scope="local")
                    total = T.alloc_buffer((3,), "float32", scope="local")
                    span = T.alloc_buffer((2,), "int32", scope="local")
                    partial = T.alloc_buffer((deep * across,), "float32", scope="shared")
                    h: T.let = by // grid.tiles
                    x: T.let = thread % across
                    y: T.let = thread // across
                    column: T.let = by % grid.tiles * across + x
                    # Columns past the end compute what is there already, and write nothing.
                    c: T.let = T.min(column, head_size - 1)
                    first: T.let = h * head_size + y * row_step
                    load_items(bonus, u_items, h, y * row_step, row_step, lanes)
                    if not is_dynamic:
                        load_items(decay, w_items, 0, first, row_step, lanes)
                    span[0] = query_start[s]
                    span[1] = query_start[s + 1]
                    load_state(
                        *(state, held, slots[s], h, y * row_step, c, row_step),
                        positions[query_start[s]] == 0,
                    )
                    for t in T.serial(span[1] - span[0]):
                        row: T.let = span[0] + t
                        load_items(r, r_items, row, first, row_step, lanes)
                        load_items(k, k_items, row, first, row_step, lanes)
                        if is_dynamic:
                            load_items(decay, w_items, row, first, row_step, lanes)
                        total[0] = T.float32(0)
                        total[1] = T.Cast("float32", v[row, h * head_size + c])
                        for j in T.unroll(row_step):
                            total[2] = T.Cast("float32", k_items[j]) * total[1]
                            total[0] = total[0] + T.Cast("float32", r_items[j]) * (
                                T.Cast("float32", u_items[j]) * total[2] + held[j]
                            )
                            held[j] = held[j] * w_items[j] + total[2]
                        partial[y * across + x] = total[0]
                        T.tvm_storage_sync("shared")
                        if y == 0 and column < head_size:
                            total[0] = T.float32(0)
                            for d in T.unroll(deep):
                                total[0] = total[0] + partial[d * across + x]
                            out[row, h * head_size + c] = total[0]
                        T.tvm_storage_sync("shared")
                    if column < head_size:
                        store_state(state, held, slots[s], h, y * row_step, c, row_step)

    return wkv_kernel
