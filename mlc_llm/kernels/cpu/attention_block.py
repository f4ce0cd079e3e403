"""Steps of attention on one block of keys: score, mask, online softmax, add values, merge.

What is not seen changes nothing, not even a bit: it may be masked, or left out with its block.
Dao et al. 2022, with query heads that share a KV head as rows of one tile. The steps work on
float32 buffers of a task; `attention.py` decides which tokens and keys a task has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import KEY_VECTORS, AttentionShape, PageSteps
from mlc_llm.kernels.cpu.attention_window import visible
from mlc_llm.kernels.cpu.vector_math import (
    LANES,
    LOG2_E,
    LOWEST,
    MASKED,
    exp2,
    multiply_add,
    reduce_max,
    splat,
    vector_lanes,
)

# Scores may exceed the maximum that weights are relative to by this much: then it seldom moves, and
# weights stay below 2**8.
_MAX_RISE = 8.0


@dataclass(frozen=True)
class BlockSteps:
    """Macros over the buffers of one task. For source, places and factors see `PageSteps`.

    acc (rows, head_dim) sums weighted values, state (rows, 2) is the maximum that weights are
    relative to and their sum, sums (rows, 16) are the lanes of that sum while blocks are added.

    load_queries(q, queries, kv_head, first, count, max_rows) fills rows with the scaled queries of
    `count` tokens, the rest with zeros. clear(acc, state, row). score(q, source, places, factors,
    scores, kv_head, rows). lower(scores, row, head, position, start) lowers scores by distance
    (ALiBi). mask(scores, row, position, start). raise_maximum(scores, state, sums, acc, row) and
    weigh(scores, factors, state, sums, row) make weights of scores. add_values(scores, source,
    places, acc, kv_head, rows, count). merge(part, part_state, i, acc, state, row) adds what row i
    of a part has summed to `row`. store(acc, state, row, sink_logits, out, token, head) divides by
    the sum of weights.
    """

    load_queries: Any
    clear: Any
    score: Any
    lower: Any
    mask: Any
    raise_maximum: Any
    weigh: Any
    add_values: Any
    merge: Any
    store: Any


def block_steps(
    shape: AttentionShape,
    reading: PageSteps,
    step: int,
    *,
    is_fetching: bool,
    has_sink_logits: bool = False,
) -> BlockSteps:
    """Return the steps for a shape, with `step` rows in registers.

    is_fetching: scoring also fetches the next block. has_sink_logits: the sum of weights counts
    the sink logit of the head.
    """
    head_dim, page_size, is_int8 = shape.head_dim, shape.page_size, shape.is_int8
    soft_cap = shape.soft_cap
    lanes = vector_lanes(head_dim)
    vectors = head_dim // lanes
    # Vectors of scores, and of the output, that are summed in registers at a time.
    span = shape.span
    width = next(count for count in range(span, 0, -1) if vectors % count == 0)
    line, half, group = reading.line, step // 2, shape.group

    @T.macro
    def load_queries(
        q: T.handle,
        queries: T.handle,
        kv_head: T.int32,
        first: T.int32,
        count: T.int32,
        max_rows: T.meta_var,
    ) -> None:
        for r in T.serial(count * group):
            for d in T.serial(head_dim):
                queries[r, d] = q[first + r // group, kv_head * group + r % group, d] * T.float32(
                    shape.query_scale
                )
        for r in T.serial(max_rows - count * group):
            for d in T.serial(head_dim):
                queries[count * group + r, d] = T.float32(0)

    @T.macro
    def clear(acc: T.handle, state: T.handle, row: T.int32) -> None:
        state[row, 0] = T.float32(LOWEST)
        state[row, 1] = T.float32(0)
        for d in T.serial(vectors):
            acc[row, T.ramp(d * lanes, 1, lanes)] = splat(T.float32(0), lanes)

    @T.macro
    def multiply_keys(
        dot: T.handle,
        q: T.handle,
        source: T.handle,
        places: T.handle,
        kv_head: T.int32,
        row: T.int32,
        rows: T.meta_var,
        d: T.int32,
        first: T.int32,
    ) -> None:
        for i in T.unroll(rows):
            for u in T.unroll(span):
                dot[i * span + u, T.ramp(0, 1, LANES)] = multiply_add(
                    splat(q[row + i, d]),
                    reading.key(source, places, kv_head, d, first + u),
                    dot[i * span + u, T.ramp(0, 1, LANES)],
                )

    @T.macro
    def finish_scores(
        dot: T.handle,
        factors: T.handle,
        scores: T.handle,
        row: T.int32,
        rows: T.meta_var,
        first: T.int32,
    ) -> None:
        for i in T.unroll(rows):
            for u in T.unroll(span):
                scores[row + i, T.ramp((first + u) * LANES, 1, LANES)] = _finish_score(
                    dot[i * span + u, T.ramp(0, 1, LANES)],
                    factors[0, T.ramp((first + u) * LANES, 1, LANES)],
                    is_int8,
                    soft_cap,
                )

    @T.macro
    def score_rows(
        q: T.handle,
        source: T.handle,
        places: T.handle,
        factors: T.handle,
        scores: T.handle,
        kv_head: T.int32,
        row: T.int32,
        first: T.int32,
        fetches: T.meta_var,
    ) -> None:
        """Score `step` rows against `span` pages."""
        # Two buffers, each small enough to stay in registers beside fetches.
        low = T.alloc_buffer((max(half, 1) * span, LANES), "float32")
        high = T.alloc_buffer(((step - half) * span, LANES), "float32")
        for i in T.unroll(half * span):
            low[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for i in T.unroll((step - half) * span):
            high[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for block in T.serial(head_dim // line):
            for j in T.unroll(line):
                if fetches:
                    for u in T.unroll(KEY_VECTORS // line):
                        reading.fetch(
                            source,
                            places,
                            j * (KEY_VECTORS // line) + u,
                            block * (line * page_size),
                        )
                d = T.meta_var(block * line + j)
                multiply_keys(low, q, source, places, kv_head, row, half, d, first)
                multiply_keys(high, q, source, places, kv_head, row + half, step - half, d, first)
        finish_scores(low, factors, scores, row, half, first)
        finish_scores(high, factors, scores, row + half, step - half, first)

    @T.macro
    def score(
        q: T.handle,
        source: T.handle,
        places: T.handle,
        factors: T.handle,
        scores: T.handle,
        kv_head: T.int32,
        rows: T.int32,
    ) -> None:
        score_rows(q, source, places, factors, scores, kv_head, 0, 0, is_fetching)
        for u in T.serial(KEY_VECTORS // span - 1):
            score_rows(q, source, places, factors, scores, kv_head, 0, (u + 1) * span, False)
        for r in T.serial((rows + step - 1) // step - 1):
            for u in T.serial(KEY_VECTORS // span):
                score_rows(
                    *(q, source, places, factors, scores, kv_head, (r + 1) * step, u * span, False)
                )

    @T.macro
    def lower(
        scores: T.handle, row: T.int32, head: T.int32, position: T.int32, start: T.int32
    ) -> None:
        for u in T.unroll(KEY_VECTORS):
            scores[row, T.ramp(u * LANES, 1, LANES)] = multiply_add(
                T.Cast(f"float32x{LANES}", T.ramp(start + u * LANES, 1, LANES) - splat(position)),
                splat(_alibi_slope(head, shape.num_heads)),
                scores[row, T.ramp(u * LANES, 1, LANES)],
            )

    @T.macro
    def mask(scores: T.handle, row: T.int32, position: T.int32, start: T.int32) -> None:
        for u in T.unroll(KEY_VECTORS):
            scores[row, T.ramp(u * LANES, 1, LANES)] = T.Select(
                visible(T.ramp(start + u * LANES, 1, LANES), position, shape),
                scores[row, T.ramp(u * LANES, 1, LANES)],
                splat(T.float32(MASKED)),
            )

    @T.macro
    def raise_maximum(
        scores: T.handle, state: T.handle, sums: T.handle, acc: T.handle, row: T.int32
    ) -> None:
        best = T.alloc_buffer((LANES,), "float32")
        best[T.ramp(0, 1, LANES)] = scores[row, T.ramp(0, 1, LANES)]
        for u in T.unroll(KEY_VECTORS - 1):
            best[T.ramp(0, 1, LANES)] = T.max(
                best[T.ramp(0, 1, LANES)], scores[row, T.ramp((u + 1) * LANES, 1, LANES)]
            )
        best[0] = reduce_max(best[T.ramp(0, 1, LANES)])
        if best[0] > state[row, 0] + T.float32(_MAX_RISE):
            # What was summed so far shrinks to the new maximum.
            best[1] = state[row, 0] - best[0]
            state[row, 0] = best[0]
            best[T.ramp(0, 1, LANES)] = exp2(splat(best[1]))
            sums[row, T.ramp(0, 1, LANES)] = (
                sums[row, T.ramp(0, 1, LANES)] * best[T.ramp(0, 1, LANES)]
            )
            for d in T.serial(vectors):
                acc[row, T.ramp(d * lanes, 1, lanes)] = acc[
                    row, T.ramp(d * lanes, 1, lanes)
                ] * splat(best[0], lanes)

    @T.macro
    def weigh(
        scores: T.handle, factors: T.handle, state: T.handle, sums: T.handle, row: T.int32
    ) -> None:
        for u in T.unroll(KEY_VECTORS):
            scores[row, T.ramp(u * LANES, 1, LANES)] = exp2(
                scores[row, T.ramp(u * LANES, 1, LANES)] - splat(state[row, 0])
            )
            sums[row, T.ramp(0, 1, LANES)] = (
                sums[row, T.ramp(0, 1, LANES)] + scores[row, T.ramp(u * LANES, 1, LANES)]
            )
            if is_int8:
                scores[row, T.ramp(u * LANES, 1, LANES)] = (
                    scores[row, T.ramp(u * LANES, 1, LANES)]
                    * factors[1, T.ramp(u * LANES, 1, LANES)]
                )

    @T.macro
    def add_values(
        scores: T.handle,
        source: T.handle,
        places: T.handle,
        acc: T.handle,
        kv_head: T.int32,
        rows: T.int32,
        count: T.int32,
    ) -> None:
        part = T.alloc_buffer((step * width, lanes), "float32")
        for r in T.serial((rows + step - 1) // step):
            for d in T.serial(vectors // width):
                for i in T.unroll(step):
                    for v in T.unroll(width):
                        part[i * width + v, T.ramp(0, 1, lanes)] = acc[
                            r * step + i, T.ramp((d * width + v) * lanes, 1, lanes)
                        ]
                for u in T.serial((count + page_size - 1) // page_size):
                    for t in T.serial(T.min(page_size, count - u * page_size)):
                        for i in T.unroll(step):
                            for v in T.unroll(width):
                                part[i * width + v, T.ramp(0, 1, lanes)] = multiply_add(
                                    splat(scores[r * step + i, u * page_size + t], lanes),
                                    reading.value(source, places, kv_head, u, t, d * width + v),
                                    part[i * width + v, T.ramp(0, 1, lanes)],
                                    lanes,
                                )
                for i in T.unroll(step):
                    for v in T.unroll(width):
                        acc[r * step + i, T.ramp((d * width + v) * lanes, 1, lanes)] = part[
                            i * width + v, T.ramp(0, 1, lanes)
                        ]

    @T.macro
    def merge(
        part: T.handle,
        part_state: T.handle,
        i: T.int32,
        acc: T.handle,
        state: T.handle,
        row: T.int32,
    ) -> None:
        factors = T.alloc_buffer((2, LANES), "float32")
        best = T.alloc_buffer((1,), "float32")
        best[0] = T.max(state[row, 0], part_state[i, 0])
        factors[0, T.ramp(0, 1, LANES)] = exp2(splat(state[row, 0] - best[0]))
        factors[1, T.ramp(0, 1, LANES)] = exp2(splat(part_state[i, 0] - best[0]))
        state[row, 0] = best[0]
        state[row, 1] = multiply_add(
            part_state[i, 1], factors[1, 0], state[row, 1] * factors[0, 0], 1
        )
        for d in T.serial(vectors):
            acc[row, T.ramp(d * lanes, 1, lanes)] = multiply_add(
                part[i, T.ramp(d * lanes, 1, lanes)],
                splat(factors[1, 0], lanes),
                acc[row, T.ramp(d * lanes, 1, lanes)] * splat(factors[0, 0], lanes),
                lanes,
            )

    @T.macro
    def store(
        acc: T.handle,
        state: T.handle,
        row: T.int32,
        sink_logits: T.handle,
        out: T.handle,
        token: T.int32,
        head: T.int32,
    ) -> None:
        if has_sink_logits:
            # Beside a weight of 2**126 all others are nothing; a larger one would overflow.
            power = T.meta_var(
                T.Cast("float32", sink_logits[head]) * T.float32(LOG2_E) - state[row, 0]
            )
            state[row, 1] = state[row, 1] + exp2(T.min(power, T.float32(126)), 1)
        state[row, 1] = T.float32(1) / state[row, 1]
        for d in T.serial(head_dim):
            out[token, head * head_dim + d] = acc[row, d] * state[row, 1]

    return BlockSteps(
        *(load_queries, clear, score, lower, mask, raise_maximum, weigh, add_values, merge, store)
    )


def _finish_score(score: Any, factor: Any, is_int8: bool, soft_cap: float) -> Any:
    """Return a vector of scores with the scales of its keys and the soft cap applied."""
    if is_int8:
        score = score * factor
    if soft_cap > 0:
        # tanh(x) = 1 - 2 / (e**2x + 1); the result is in powers of two, like scores without a cap.
        power = T.min(score * splat(T.float32(2 / soft_cap * LOG2_E)), splat(T.float32(126)))
        ratio = exp2(power) + splat(T.float32(1))
        cap = soft_cap * LOG2_E
        score = splat(T.float32(cap)) - splat(T.float32(2 * cap)) / ratio
    return score


def _alibi_slope(head: Any, num_heads: int) -> Any:
    """Return how much a score falls with a token's distance, as a power of two like scores.

    Press et al. 2022, section 3: a geometric series; where the number of heads is no power of two,
    every second term of the next longer one follows.
    """
    whole = 2 ** int(math.log2(num_heads))
    number = T.if_then_else(head < whole, 2 * (head + 1), 2 * (head - whole) + 1)
    return exp2(T.Cast("float32", number) * T.float32(-4 / whole), 1) * T.float32(LOG2_E)
