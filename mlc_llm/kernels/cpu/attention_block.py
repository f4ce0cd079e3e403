"""Steps of attention over one block of keys: load, score, mask, online softmax, add values.

Dao et al. 2022, with query heads that share a KV head as rows of one tile. The steps work on
float32 buffers of a task; `attention.py` decides which tokens and keys a task has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    LANES,
    MASKED,
    exp,
    reduce_max,
    splat,
    vector_lanes,
)

# Keys per step of the online softmax: four vectors of scores.
KEY_BLOCK = 64
KEY_VECTORS = KEY_BLOCK // LANES


@dataclass(frozen=True)
class AttentionShape:
    """What the attention kernel is specialised for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    scale: float
    window: int  # tokens a query sees, itself included; -1 sees all
    sinks: int = 0  # first tokens that every query sees in spite of the window
    soft_cap: float = 0.0  # scores become cap * tanh(score / cap); 0 leaves them (Gemma 2)

    @property
    def group(self) -> int:
        """Return the number of query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def row_step(self) -> int:
        """Return how many rows share one load of keys or values in registers."""
        return 3 if self.group % 3 == 0 and self.group % 4 else 4

    @property
    def is_int8(self) -> bool:
        """Return whether pages hold int8 codes with a scale for each token."""
        return self.kv_dtype == "int8"

    @property
    def page_items(self) -> int:
        """Return the items of a head's K or V in a page, see `KVCacheLayout`."""
        return self.page_size * (self.head_dim + 4 if self.is_int8 else self.head_dim)

    def padded_rows(self, tokens: int) -> int:
        """Return the rows of a tile of `tokens`, filled up to whole register steps."""
        return -(-tokens * self.group // self.row_step) * self.row_step


@dataclass(frozen=True)
class BlockSteps:
    """Macros over the buffers of one task.

    load(pages, page_table, keys, values, factors, s, kv_head, start, end): one block as float32,
    keys (head_dim, 64) and values (64, head_dim); int8 ones stay codes and factors (2, 64) are
    their scales. score(q, keys, factors, scores, rows). mask(scores, row, position, start).
    softmax(scores, state, sums, acc, row): state (rows, 2) is the running maximum and a scratch,
    sums (rows, 16) the lanes of the running sum. add_values(scores, values, factors, acc, rows,
    count).
    """

    load: Any
    score: Any
    mask: Any
    softmax: Any
    add_values: Any


def block_steps(shape: AttentionShape) -> BlockSteps:
    """Return the steps for a shape. Pages must hold 16 tokens: a page of scores is one vector."""
    head_dim, page_size, step = shape.head_dim, shape.page_size, shape.row_step
    window, sinks, soft_cap = shape.window, shape.sinks, shape.soft_cap
    is_int8 = shape.is_int8
    lanes = vector_lanes(head_dim)
    vectors = head_dim // lanes
    # Vectors of the output that are summed in registers at a time.
    width = next(count for count in (4, 3, 2, 1) if vectors % count == 0)
    assert page_size == LANES, "scores of one page are one vector"

    @T.macro
    def load(
        pages: T.handle,
        page_table: T.handle,
        keys: T.handle,
        values: T.handle,
        factors: T.handle,
        s: T.int32,
        kv_head: T.int32,
        start: T.int32,
        end: T.int32,
    ) -> None:
        for u in T.serial(KEY_VECTORS):
            if start + u * page_size < end:
                page = page_table[s, start // page_size + u]
                for d in T.serial(head_dim):
                    keys[d, T.ramp(u * LANES, 1, LANES)] = T.Cast(
                        f"float32x{LANES}",
                        pages[page, 0, kv_head, T.ramp(d * page_size, 1, LANES)],
                    )
                if is_int8:
                    for side in T.unroll(2):
                        factors[side, T.ramp(u * LANES, 1, LANES)] = T.reinterpret(
                            f"float32x{LANES}",
                            pages[
                                page,
                                side,
                                kv_head,
                                T.ramp(page_size * head_dim, 1, 4 * page_size),
                            ],
                        )
                for t in T.serial(page_size):
                    for d in T.unroll(vectors):
                        values[u * page_size + t, T.ramp(d * lanes, 1, lanes)] = T.Cast(
                            f"float32x{lanes}",
                            pages[page, 1, kv_head, T.ramp(t * head_dim + d * lanes, 1, lanes)],
                        )

    @T.macro
    def score(
        q: T.handle, keys: T.handle, factors: T.handle, scores: T.handle, rows: T.int32
    ) -> None:
        dot = T.alloc_buffer((step * KEY_VECTORS, LANES), "float32")
        for r in T.serial((rows + step - 1) // step):
            for i in T.unroll(step * KEY_VECTORS):
                dot[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
            for d in T.serial(head_dim):
                for i in T.unroll(step):
                    for u in T.unroll(KEY_VECTORS):
                        dot[i * KEY_VECTORS + u, T.ramp(0, 1, LANES)] = (
                            dot[i * KEY_VECTORS + u, T.ramp(0, 1, LANES)]
                            + splat(q[r * step + i, d]) * keys[d, T.ramp(u * LANES, 1, LANES)]
                        )
            for i in T.unroll(step):
                for u in T.unroll(KEY_VECTORS):
                    scores[r * step + i, T.ramp(u * LANES, 1, LANES)] = _finish_score(
                        dot[i * KEY_VECTORS + u, T.ramp(0, 1, LANES)],
                        factors[0, T.ramp(u * LANES, 1, LANES)],
                        is_int8,
                        soft_cap,
                    )

    @T.macro
    def mask(scores: T.handle, row: T.int32, position: T.int32, start: T.int32) -> None:
        for u in T.unroll(KEY_VECTORS):
            scores[row, T.ramp(u * LANES, 1, LANES)] = T.Select(
                _visible(T.ramp(start + u * LANES, 1, LANES), position, window, sinks),
                scores[row, T.ramp(u * LANES, 1, LANES)],
                splat(T.float32(MASKED)),
            )

    @T.macro
    def softmax(
        scores: T.handle, state: T.handle, sums: T.handle, acc: T.handle, row: T.int32
    ) -> None:
        best = T.alloc_buffer((LANES,), "float32")
        best[T.ramp(0, 1, LANES)] = scores[row, T.ramp(0, 1, LANES)]
        for u in T.unroll(KEY_VECTORS - 1):
            best[T.ramp(0, 1, LANES)] = T.max(
                best[T.ramp(0, 1, LANES)], scores[row, T.ramp((u + 1) * LANES, 1, LANES)]
            )
        best[0] = reduce_max(best[T.ramp(0, 1, LANES)])
        if best[0] > state[row, 0]:
            # What was summed so far shrinks to the new maximum.
            state[row, 1] = state[row, 0] - best[0]
            state[row, 0] = best[0]
            best[T.ramp(0, 1, LANES)] = exp(splat(state[row, 1]))
            sums[row, T.ramp(0, 1, LANES)] = (
                sums[row, T.ramp(0, 1, LANES)] * best[T.ramp(0, 1, LANES)]
            )
            for d in T.serial(vectors):
                acc[row, T.ramp(d * lanes, 1, lanes)] = acc[
                    row, T.ramp(d * lanes, 1, lanes)
                ] * splat(best[0], lanes)
        for u in T.unroll(KEY_VECTORS):
            scores[row, T.ramp(u * LANES, 1, LANES)] = exp(
                scores[row, T.ramp(u * LANES, 1, LANES)] - splat(state[row, 0])
            )
            sums[row, T.ramp(0, 1, LANES)] = (
                sums[row, T.ramp(0, 1, LANES)] + scores[row, T.ramp(u * LANES, 1, LANES)]
            )

    @T.macro
    def add_values(
        scores: T.handle,
        values: T.handle,
        factors: T.handle,
        acc: T.handle,
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
                for t in T.serial(count):
                    for i in T.unroll(step):
                        for v in T.unroll(width):
                            part[i * width + v, T.ramp(0, 1, lanes)] = (
                                part[i * width + v, T.ramp(0, 1, lanes)]
                                + splat(
                                    scores[r * step + i, t] * factors[1, t]
                                    if is_int8
                                    else scores[r * step + i, t],
                                    lanes,
                                )
                                * values[t, T.ramp((d * width + v) * lanes, 1, lanes)]
                            )
                for i in T.unroll(step):
                    for v in T.unroll(width):
                        acc[r * step + i, T.ramp((d * width + v) * lanes, 1, lanes)] = part[
                            i * width + v, T.ramp(0, 1, lanes)
                        ]

    return BlockSteps(load, score, mask, softmax, add_values)


def _finish_score(score: Any, factor: Any, is_int8: bool, soft_cap: float) -> Any:
    """Return a vector of scores with the scales of its keys and the soft cap applied."""
    if is_int8:
        score = score * factor
    if soft_cap > 0:
        # tanh(x) = 1 - 2 / (e**2x + 1)
        ratio = exp(score * splat(T.float32(2 / soft_cap))) + splat(T.float32(1))
        score = splat(T.float32(soft_cap)) - splat(T.float32(2 * soft_cap)) / ratio
    return score


def _visible(keys: Any, position: Any, window: int, sinks: int) -> Any:
    """Return a mask: which of 16 keys the query at `position` sees."""
    mask = keys <= splat(position)
    if window > 0:
        recent = keys > splat(position - window)
        mask = T.bitwise_and(mask, T.bitwise_or(recent, keys < splat(T.int32(sinks))))
    return mask
