"""How attention reads paged keys and values, a block of 64 keys at a time.

Knows the page layout, which `rope.py` writes; not what is computed from a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu.vector_math import LANES, LOG2_E, prefetch, vector_lanes

# Keys per step of the online softmax: four pages, each a vector of scores.
KEY_BLOCK = 64
KEY_VECTORS = KEY_BLOCK // LANES
# What a fetch brings; where lines are longer some fetches are for nothing.
_LINE_BYTES = 64


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
    is_chunked: bool = False  # windows do not slide: each begins where the one before ends
    soft_cap: float = 0.0  # scores become cap * tanh(score / cap); 0 leaves them (Gemma 2)
    alibi: bool = False  # scores fall with distance, by a slope for each head
    span: int = KEY_VECTORS  # vectors for which registers suffice; 1 without AVX-512

    @property
    def group(self) -> int:
        """Return the number of query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def first_key(self, position: Any) -> Any:
        """Return the first key in the window of a query, below 0 where the text begins later."""
        if self.is_chunked:
            return position // self.window * self.window
        return position - self.window + 1

    @property
    def query_scale(self) -> float:
        """Return what queries are multiplied with, so that weights are powers of two."""
        return self.scale if self.soft_cap > 0 else self.scale * LOG2_E

    @property
    def is_int8(self) -> bool:
        """Return whether pages hold int8 codes with a scale for each token."""
        return self.kv_dtype == "int8"

    @property
    def page_items(self) -> int:
        """Return the items of a head's K or V in a page, see `KVCacheLayout`."""
        return self.page_size * (self.head_dim + 4 if self.is_int8 else self.head_dim)

    def row_step(self, tokens: int) -> int:
        """Return how many rows of `tokens` share one load of keys or values in registers."""
        if tokens * self.group <= 4:
            return tokens * self.group
        return 3 if self.group % 3 == 0 and self.group % 4 else 4

    def padded_rows(self, tokens: int) -> int:
        """Return the rows of `tokens`, filled up to whole register steps."""
        step = self.row_step(tokens)
        return -(-tokens * self.group // step) * step


@dataclass(frozen=True)
class PageSteps:
    """How a task reads its blocks.

    `source` is the pages themselves or, where many rows share a block, a copy of it (64 *
    head_dim) as float32, which holds first the keys and then the values. places (9) are the pages
    of the block, those of the block to fetch meanwhile, and its KV head.

    key(source, places, kv_head, d, u) is dimension d of the 16 keys of page u, value(source,
    places, kv_head, u, t, v) vector v of the value of its token t. Macros: find(page_table,
    places, at, s, start, end) writes four places. load_keys and load_values(pages, source, places,
    kv_head) make the copy. load_factors(pages, places, factors, kv_head): factors (2, 64) become
    the scales of int8 codes. fetch(pages, places, u, item) fetches a line of page u of the next
    block, keys and values; load_keys does it for all of `line` dimensions each.
    """

    key: Callable[..., Any]
    value: Callable[..., Any]
    line: int
    find: Any
    fetch: Any
    load_keys: Any
    load_values: Any
    load_factors: Any


def page_steps(shape: AttentionShape, *, is_copied: bool) -> PageSteps:
    """Return the steps for a shape. Pages must hold 16 tokens: a page of scores is one vector."""
    head_dim, page_size, is_int8 = shape.head_dim, shape.page_size, shape.is_int8
    lanes = vector_lanes(head_dim)
    # Dimensions of a page's keys in a cache line, as far as they divide all.
    line = math.gcd(_LINE_BYTES // (page_size * numpy_dtype(shape.kv_dtype).itemsize), head_dim)
    assert page_size == LANES, "scores of one page are one vector"

    def key(source: Any, places: Any, kv_head: Any, d: Any, u: Any) -> Any:
        if is_copied:
            return source[T.ramp(d * KEY_BLOCK + u * LANES, 1, LANES)]
        return _as_float(source[places[u], 0, kv_head, T.ramp(d * page_size, 1, LANES)], LANES)

    def value(source: Any, places: Any, kv_head: Any, u: Any, t: Any, v: Any) -> Any:
        item = t * head_dim + v * lanes
        if is_copied:
            return source[T.ramp(u * (page_size * head_dim) + item, 1, lanes)]
        return _as_float(source[places[u], 1, kv_head, T.ramp(item, 1, lanes)], lanes)

    @T.macro
    def find(
        page_table: T.handle,
        places: T.handle,
        at: T.int32,
        s: T.int32,
        start: T.int32,
        end: T.int32,
    ) -> None:
        for u in T.unroll(KEY_VECTORS):
            # Pages past the end repeat the last one: what they hold is masked.
            places[at + u] = page_table[s, T.min(start // page_size + u, (end - 1) // page_size)]

    @T.macro
    def fetch(pages: T.handle, places: T.handle, u: T.int32, item: T.int32) -> None:
        for side in T.unroll(2):
            T.evaluate(
                prefetch(
                    T.address_of(
                        pages[places[KEY_VECTORS + u], side, places[2 * KEY_VECTORS], item]
                    )
                )
            )

    @T.macro
    def load_keys(pages: T.handle, source: T.handle, places: T.handle, kv_head: T.int32) -> None:
        for u in T.serial(KEY_VECTORS):
            for d in T.serial(head_dim // line):
                fetch(pages, places, u, d * (line * page_size))
                for i in T.unroll(line):
                    source[T.ramp((d * line + i) * KEY_BLOCK + u * LANES, 1, LANES)] = _as_float(
                        pages[places[u], 0, kv_head, T.ramp((d * line + i) * page_size, 1, LANES)],
                        LANES,
                    )

    @T.macro
    def load_values(pages: T.handle, source: T.handle, places: T.handle, kv_head: T.int32) -> None:
        for u in T.serial(KEY_VECTORS):
            for i in T.serial(head_dim):
                source[T.ramp((u * head_dim + i) * LANES, 1, LANES)] = _as_float(
                    pages[places[u], 1, kv_head, T.ramp(i * LANES, 1, LANES)], LANES
                )

    @T.macro
    def load_factors(
        pages: T.handle, places: T.handle, factors: T.handle, kv_head: T.int32
    ) -> None:
        if is_int8:
            for u in T.unroll(KEY_VECTORS):
                fetch(pages, places, u, page_size * head_dim)
                for side in T.unroll(2):
                    factors[side, T.ramp(u * LANES, 1, LANES)] = T.reinterpret(
                        f"float32x{LANES}",
                        pages[
                            places[u],
                            side,
                            kv_head,
                            T.ramp(page_size * head_dim, 1, 4 * page_size),
                        ],
                    )

    return PageSteps(key, value, line, find, fetch, load_keys, load_values, load_factors)


def _as_float(x: Any, lanes: int) -> Any:
    return T.Cast(f"float32x{lanes}", x)
