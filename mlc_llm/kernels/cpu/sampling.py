"""Sampling from logits of large vocabularies without sorting them.

What top-k and top-p keep is found as a threshold on the weights, by bisection over the bits of
positive float32 numbers, which order as integers do.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import LANES, exp, reduce_max, reduce_sum, splat

# Below this temperature the likeliest token is taken, the first of equals.
GREEDY_TEMPERATURE = 1e-5
_BITS_OF_ONE = 0x3F800000
# Vectors of weights that `draw` sums at a time.
BLOCK_VECTORS = 16


def sample() -> Any:
    """Choose a token a row: logits (r, v) float32; temperature, top_p, min_p (r) float32;
    top_k (r) int32, 0 for all; uniform (r) float64 in [0, 1) -> tokens (r) int32.

    top_k keeps the k likeliest tokens and their equals, then top_p the fewest whose weights reach
    that part of what is left (Holtzman et al. 2020), min_p those of at least that part of the
    likeliest one's weight.
    """

    @T.macro
    def measure(
        weights: T.handle, found: T.handle, row: T.int32, vectors: T.int32, bits: T.int32
    ) -> None:
        """found = the sum and the number of weights of at least the one with these bits."""
        sums = T.alloc_buffer((2, LANES), "float32")
        for i in T.unroll(2):
            sums[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for i in T.serial(vectors):
            kept = weights[row, T.ramp(i * LANES, 1, LANES)] >= splat(
                T.reinterpret("float32", bits)
            )
            sums[0, T.ramp(0, 1, LANES)] = sums[0, T.ramp(0, 1, LANES)] + T.Select(
                kept, weights[row, T.ramp(i * LANES, 1, LANES)], splat(T.float32(0))
            )
            sums[1, T.ramp(0, 1, LANES)] = sums[1, T.ramp(0, 1, LANES)] + T.Select(
                kept, splat(T.float32(1)), splat(T.float32(0))
            )
        for i in T.unroll(2):
            found[i] = reduce_sum(sums[i, T.ramp(0, 1, LANES)])

    @T.macro
    def raise_threshold(
        weights: T.handle,
        found: T.handle,
        bounds: T.handle,
        row: T.int32,
        vectors: T.int32,
        index: T.int32,
        wanted: T.float32,
    ) -> None:
        """bounds[0] = the largest bits at which found[index] still reaches `wanted`."""
        goal = T.alloc_buffer((1,), "float32")
        goal[0] = wanted  # an expression of what is measured now
        bounds[1] = _BITS_OF_ONE + 1
        for _ in T.serial(31):
            if bounds[1] - bounds[0] > 1:
                measure(weights, found, row, vectors, bounds[0] + (bounds[1] - bounds[0]) // 2)
                if found[index] >= goal[0]:
                    bounds[0] = bounds[0] + (bounds[1] - bounds[0]) // 2
                else:
                    bounds[1] = bounds[0] + (bounds[1] - bounds[0]) // 2

    @T.macro
    def search(
        weights: T.handle,
        tokens: T.handle,
        place: T.handle,
        total: T.handle,
        row: T.int32,
        vectors: T.int32,
        block: T.int32,
        threshold: T.float32,
        target: T.float64,
    ) -> None:
        """Look for the token in one block; the last kept one of it stands if none passes."""
        end = T.min((block + 1) * BLOCK_VECTORS, vectors) * LANES
        for i in T.serial(end - block * BLOCK_VECTORS * LANES):
            if place[0] == 0:
                if weights[row, block * BLOCK_VECTORS * LANES + i] >= threshold:
                    total[0] = total[0] + T.Cast(
                        "float64", weights[row, block * BLOCK_VECTORS * LANES + i]
                    )
                    tokens[row] = block * BLOCK_VECTORS * LANES + i
                    if total[0] > target:
                        place[0] = 1

    @T.macro
    def draw(
        weights: T.handle,
        tokens: T.handle,
        row: T.int32,
        vectors: T.int32,
        threshold: T.float32,
        target: T.float64,
    ) -> None:
        """tokens[row] = the token at which the running sum of kept weights passes `target`.

        Sums go block by block; only the block that passes the target is looked at token by token.
        """
        total = T.alloc_buffer((1,), "float64")
        block_sum = T.alloc_buffer((1,), "float64")
        sums = T.alloc_buffer((LANES,), "float32")
        place = T.alloc_buffer((2,), "int32")  # 1 when found; the last block with a kept token
        total[0] = T.float64(0)
        place[0] = 0
        place[1] = 0
        for block in T.serial((vectors + BLOCK_VECTORS - 1) // BLOCK_VECTORS):
            if place[0] == 0:
                sums[T.ramp(0, 1, LANES)] = splat(T.float32(0))
                for i in T.serial(T.min(BLOCK_VECTORS, vectors - block * BLOCK_VECTORS)):
                    sums[T.ramp(0, 1, LANES)] = sums[T.ramp(0, 1, LANES)] + T.Select(
                        weights[row, T.ramp((block * BLOCK_VECTORS + i) * LANES, 1, LANES)]
                        >= splat(threshold),
                        weights[row, T.ramp((block * BLOCK_VECTORS + i) * LANES, 1, LANES)],
                        splat(T.float32(0)),
                    )
                block_sum[0] = T.Cast("float64", reduce_sum(sums[T.ramp(0, 1, LANES)]))
                if block_sum[0] > T.float64(0):
                    place[1] = block
                if total[0] + block_sum[0] > target:
                    search(weights, tokens, place, total, row, vectors, block, threshold, target)
                else:
                    total[0] = total[0] + block_sum[0]
        if place[0] == 0:
            # The sums of blocks fell short by a rounding: the last kept token it is.
            search(
                weights, tokens, place, total, row, vectors, place[1], threshold, T.float64(3e38)
            )

    @T.macro
    def one_row(
        logits: T.handle,
        temperature: T.handle,
        top_p: T.handle,
        min_p: T.handle,
        top_k: T.handle,
        uniform: T.handle,
        weights: T.handle,
        tokens: T.handle,
        row: T.int32,
        v: T.int32,
    ) -> None:
        best = T.alloc_buffer((LANES,), "float32")
        found = T.alloc_buffer((2,), "float32")
        bounds = T.alloc_buffer((2,), "int32")
        best[T.ramp(0, 1, LANES)] = splat(T.min_value("float32"))
        for i in T.serial(v // LANES):
            best[T.ramp(0, 1, LANES)] = T.max(
                best[T.ramp(0, 1, LANES)], logits[row, T.ramp(i * LANES, 1, LANES)]
            )
        best[0] = reduce_max(best[T.ramp(0, 1, LANES)])
        for i in T.serial(v % LANES):
            best[0] = T.max(best[0], logits[row, v // LANES * LANES + i])
        if temperature[row] < T.float32(GREEDY_TEMPERATURE):
            for i in T.serial(v):
                if logits[row, v - 1 - i] >= best[0]:
                    tokens[row] = v - 1 - i
        else:
            for i in T.serial(v // LANES):
                weights[row, T.ramp(i * LANES, 1, LANES)] = exp(
                    (logits[row, T.ramp(i * LANES, 1, LANES)] - splat(best[0]))
                    / splat(temperature[row])
                )
            if v % LANES > 0:
                best[T.ramp(0, 1, LANES)] = splat(best[0])
                for i in T.serial(LANES):
                    weights[row, v // LANES * LANES + i] = T.min_value("float32")
                for i in T.serial(v % LANES):
                    weights[row, v // LANES * LANES + i] = (
                        logits[row, v // LANES * LANES + i] - best[0]
                    ) / temperature[row]
                weights[row, T.ramp(v // LANES * LANES, 1, LANES)] = T.Select(
                    T.ramp(0, 1, LANES) < splat(v % LANES),
                    exp(weights[row, T.ramp(v // LANES * LANES, 1, LANES)]),
                    splat(T.float32(0)),
                )
            bounds[0] = T.max(
                T.reinterpret("int32", T.min(T.max(min_p[row], T.float32(0)), T.float32(1))), 1
            )
            if top_k[row] > 0:
                raise_threshold(
                    weights,
                    found,
                    bounds,
                    row,
                    (v + LANES - 1) // LANES,
                    1,
                    T.Cast("float32", top_k[row]),
                )
            measure(weights, found, row, (v + LANES - 1) // LANES, bounds[0])
            if top_p[row] < T.float32(1):
                raise_threshold(
                    weights,
                    found,
                    bounds,
                    row,
                    (v + LANES - 1) // LANES,
                    0,
                    top_p[row] * found[0],
                )
                measure(weights, found, row, (v + LANES - 1) // LANES, bounds[0])
            draw(
                weights,
                tokens,
                row,
                (v + LANES - 1) // LANES,
                T.reinterpret("float32", bounds[0]),
                uniform[row] * T.Cast("float64", found[0]),
            )

    @T.prim_func(private=True, s_tir=True)
    def sample_kernel(
        logits_handle: T.handle,
        temperature_handle: T.handle,
        top_p_handle: T.handle,
        min_p_handle: T.handle,
        top_k_handle: T.handle,
        uniform_handle: T.handle,
        tokens_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        r = T.int32()
        v = T.int32()
        logits = T.match_buffer(logits_handle, (r, v), "float32")
        temperature = T.match_buffer(temperature_handle, (r,), "float32")
        top_p = T.match_buffer(top_p_handle, (r,), "float32")
        min_p = T.match_buffer(min_p_handle, (r,), "float32")
        top_k = T.match_buffer(top_k_handle, (r,), "int32")
        uniform = T.match_buffer(uniform_handle, (r,), "float64")
        tokens = T.match_buffer(tokens_handle, (r,), "int32")
        weights = T.alloc_buffer((r, (v + LANES - 1) // LANES * LANES), "float32")
        for row in T.parallel(r):
            one_row(
                logits,
                temperature,
                top_p,
                min_p,
                top_k,
                uniform,
                weights,
                tokens,
                row,
                v,
            )

    return sample_kernel
