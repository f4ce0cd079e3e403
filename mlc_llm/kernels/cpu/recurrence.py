"""Recurrences over the tokens of each sequence, with a state that is read and written in place.

Common arguments, all int32: positions (n), query_start (b + 1), state_slots (b); the state of
sequence i is state[state_slots[i]]. What begins at position 0 begins with zeros. Tokens of a
sequence are taken one after the other, so that neither chunks nor company change a bit.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    multiply_add,
    silu,
    span,
    splat,
    vector_lanes,
)

# Columns of a state that one task works on: with 128 rows of them, the nearest cache is full.
TILE = 64


def token_shift(width: int) -> Any:
    """Delay by one token: x (n, width) float32 -> (n, width), each row's predecessor.

    state (slots, width) float32 holds the last row of each sequence.
    """
    lanes = vector_lanes(width)
    blocks = width // lanes

    @T.prim_func(private=True, s_tir=True)
    def token_shift_kernel(
        x_handle: T.handle,
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        b = T.int32()
        num_starts = T.int32()
        num_slots = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (b,), "int32")
        state = T.match_buffer(state_handle, (num_slots, width), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        for s in T.serial(b):
            for c in T.serial(blocks):
                if positions[query_start[s]] == 0:
                    out[query_start[s], span(c * lanes, lanes)] = splat(T.float32(0), lanes)
                else:
                    out[query_start[s], span(c * lanes, lanes)] = state[
                        slots[s], span(c * lanes, lanes)
                    ]
            for t in T.serial(query_start[s + 1] - query_start[s] - 1):
                for c in T.serial(blocks):
                    out[query_start[s] + t + 1, span(c * lanes, lanes)] = x[
                        query_start[s] + t, span(c * lanes, lanes)
                    ]
            for c in T.serial(blocks):
                state[slots[s], span(c * lanes, lanes)] = x[
                    query_start[s + 1] - 1, span(c * lanes, lanes)
                ]

    return token_shift_kernel


def causal_conv(channels: int, taps: int, dtype: str) -> Any:
    """Convolve each channel over time, then silu: x (n, channels) float32, weight (channels, 1,
    taps) -> (n, channels) float32, out[t] = silu(sum of weight[j] * x[t - taps + 1 + j]).

    state (slots, taps - 1, channels) float32 holds the last inputs of each sequence, oldest first.
    """
    lanes = vector_lanes(channels)
    kept = taps - 1

    @T.macro
    def one_block(
        x: T.handle,
        weight: T.handle,
        positions: T.handle,
        query_start: T.handle,
        slots: T.handle,
        state: T.handle,
        out: T.handle,
        b: T.int32,
        c: T.int32,
    ) -> None:
        factor = T.alloc_buffer((taps, lanes), "float32")
        window = T.alloc_buffer((taps, lanes), "float32")
        total = T.alloc_buffer((lanes,), "float32")
        for j in T.serial(taps):
            for v in T.serial(lanes):
                factor[j, v] = T.Cast("float32", weight[c * lanes + v, 0, j])
        for s in T.serial(b):
            for j in T.serial(kept):
                if positions[query_start[s]] == 0:
                    window[j + 1, span(0, lanes)] = splat(T.float32(0), lanes)
                else:
                    window[j + 1, span(0, lanes)] = state[slots[s], j, span(c * lanes, lanes)]
            for t in T.serial(query_start[s + 1] - query_start[s]):
                total[span(0, lanes)] = splat(T.float32(0), lanes)
                for j in T.unroll(kept):
                    window[j, span(0, lanes)] = window[j + 1, span(0, lanes)]
                    total[span(0, lanes)] = multiply_add(
                        factor[j, span(0, lanes)],
                        window[j, span(0, lanes)],
                        total[span(0, lanes)],
                        lanes,
                    )
                window[kept, span(0, lanes)] = x[query_start[s] + t, span(c * lanes, lanes)]
                out[query_start[s] + t, span(c * lanes, lanes)] = silu(
                    multiply_add(
                        factor[kept, span(0, lanes)],
                        window[kept, span(0, lanes)],
                        total[span(0, lanes)],
                        lanes,
                    ),
                    lanes,
                )
            for j in T.serial(kept):
                state[slots[s], j, span(c * lanes, lanes)] = window[j + 1, span(0, lanes)]

    @T.prim_func(private=True, s_tir=True)
    def causal_conv_kernel(
        x_handle: T.handle,
        weight: T.Buffer((channels, 1, taps), dtype),
        positions_handle: T.handle,
        start_handle: T.handle,
        slots_handle: T.handle,
        state_handle: T.handle,
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        b = T.int32()
        num_starts = T.int32()
        num_slots = T.int32()
        x = T.match_buffer(x_handle, (n, channels), "float32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (b,), "int32")
        state = T.match_buffer(state_handle, (num_slots, kept, channels), "float32")
        out = T.match_buffer(out_handle, (n, channels), "float32")
        for c in T.parallel(channels // lanes):
            one_block(x, weight, positions, query_start, slots, state, out, b, c)

    return causal_conv_kernel


def wkv(num_heads: int, head_size: int, bonus_dtype: str, decay_is_dynamic: bool) -> Any:
    """Run the linear attention of RWKV: r, k, v (n, heads * size) float32 -> the same shape.

    Peng et al. 2024 (Eagle and Finch), section 4.2: for each head, with the state S (size, size),
    row i of which is decayed by w[i],

        out = sum over i of r[i] * (bonus[i] * k[i] * v + S[i]);  S[i] = w[i] * S[i] + k[i] * v

    decay w: (n, heads * size) float32, or (1, heads * size) for all tokens, of Eagle. bonus:
    (heads, size). state (slots, heads, size, size) float32.
    """
    lanes = vector_lanes(head_size)
    tile = min(head_size, TILE)
    vectors = tile // lanes
    tiles = head_size // tile
    width = num_heads * head_size
    assert head_size % tile == 0

    @T.macro
    def one_tile(
        r: T.handle,
        k: T.handle,
        v: T.handle,
        decay: T.handle,
        bonus: T.handle,
        state: T.handle,
        out: T.handle,
        slot: T.int32,
        first: T.int32,
        count: T.int32,
        position: T.int32,
        h: T.int32,
        column: T.int32,
    ) -> None:
        total = T.alloc_buffer((tile,), "float32")
        product = T.alloc_buffer((lanes,), "float32")
        if position == 0:
            for i in T.serial(head_size):
                for j in T.unroll(vectors):
                    state[slot, h, i, span(column + j * lanes, lanes)] = splat(T.float32(0), lanes)
        for t in T.serial(count):
            for j in T.unroll(vectors):
                total[span(j * lanes, lanes)] = splat(T.float32(0), lanes)
            for i in T.serial(head_size):
                for j in T.unroll(vectors):
                    product[span(0, lanes)] = (
                        splat(k[first + t, h * head_size + i], lanes)
                        * v[first + t, span(h * head_size + column + j * lanes, lanes)]
                    )
                    total[span(j * lanes, lanes)] = multiply_add(
                        splat(r[first + t, h * head_size + i], lanes),
                        multiply_add(
                            splat(T.Cast("float32", bonus[h, i]), lanes),
                            product[span(0, lanes)],
                            state[slot, h, i, span(column + j * lanes, lanes)],
                            lanes,
                        ),
                        total[span(j * lanes, lanes)],
                        lanes,
                    )
                    state[slot, h, i, span(column + j * lanes, lanes)] = multiply_add(
                        splat(
                            decay[first + t if decay_is_dynamic else 0, h * head_size + i], lanes
                        ),
                        state[slot, h, i, span(column + j * lanes, lanes)],
                        product[span(0, lanes)],
                        lanes,
                    )
            for j in T.unroll(vectors):
                out[first + t, span(h * head_size + column + j * lanes, lanes)] = total[
                    span(j * lanes, lanes)
                ]

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
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        b = T.int32()
        num_starts = T.int32()
        num_slots = T.int32()
        num_decays = T.int32()
        r = T.match_buffer(r_handle, (n, width), "float32")
        k = T.match_buffer(k_handle, (n, width), "float32")
        v = T.match_buffer(v_handle, (n, width), "float32")
        decay = T.match_buffer(decay_handle, (num_decays, width), "float32")
        positions = T.match_buffer(positions_handle, (n,), "int32")
        query_start = T.match_buffer(start_handle, (num_starts,), "int32")
        slots = T.match_buffer(slots_handle, (b,), "int32")
        state = T.match_buffer(
            state_handle, (num_slots, num_heads, head_size, head_size), "float32"
        )
        out = T.match_buffer(out_handle, (n, width), "float32")
        for task in T.parallel(b * num_heads * tiles):
            one_tile(
                r,
                k,
                v,
                decay,
                bonus,
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

    return wkv_kernel
