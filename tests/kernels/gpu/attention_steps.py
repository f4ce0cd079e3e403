"""Random steps of attention over pages, and what a dense softmax in NumPy makes of them."""

from __future__ import annotations

import numpy as np

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu.attention_pages import AttentionShape

PAGE = 16
# (context, new tokens) of each sequence: chunks that begin inside pages, single tokens beside.
RAGGED = [(5, 5), (130, 1), (70, 37), (64, 64), (17, 3), (65, 2), (290, 5)]


class Step:
    """Random inputs of one step over sequences whose pages lie in any order."""

    def __init__(self, shape: AttentionShape, work: list[tuple[int, int]], dtype: str) -> None:
        rng = np.random.default_rng(7)
        self.shape, self.work, self.dtype = shape, work, dtype
        counts = [-(-context // PAGE) for context, _ in work]
        order = iter(rng.permutation(sum(counts) + 3).tolist())
        # What rows of fewer pages are filled up with is no page.
        self.page_table = np.full((len(work), max(counts) + 1), -1, np.int32)
        # Slots that hold no token may hold anything, even this.
        size = (sum(counts) + 3, 2, shape.num_kv_heads, PAGE, shape.head_dim)
        pages = np.full(size, np.nan, shape.kv_dtype)
        self.kv = []
        for row, (context, _) in enumerate(work):
            kv = rng.standard_normal((2, shape.num_kv_heads, context, shape.head_dim))
            self.kv.append(kv.astype(shape.kv_dtype).astype(np.float64))
            for place in range(counts[row]):
                page = self.page_table[row, place] = next(order)
                part = kv[:, :, place * PAGE : (place + 1) * PAGE]
                pages[page, :, :, : part.shape[2]] = part
        self.pages = pages.reshape(*size[:3], -1)
        self.query_start = np.cumsum([0, *(count for _, count in work)]).astype(np.int32)
        positions = [np.arange(context - count, context) for context, count in work]
        self.positions = np.concatenate(positions).astype(np.int32)
        n = len(self.positions)
        self.q = (2 * rng.standard_normal((n, shape.num_heads, shape.head_dim))).astype(
            numpy_dtype(dtype)
        )

    def tensors(self, max_parts: int, sink_logits: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return what the kernel is given by the names of its arguments."""
        shape, n = self.shape, len(self.positions)
        extra = {} if sink_logits is None else {"sink_logits": sink_logits}
        scratch = (len(self.work), shape.num_heads, max_parts, shape.head_dim + 2)
        return {
            "q": self.q,
            "pages": self.pages,
            "query_start": self.query_start,
            "page_table": self.page_table,
            "positions": self.positions,
            "scratch": np.full(scratch, np.nan, np.float32),
            "out": np.full((n, shape.num_heads * shape.head_dim), np.nan, numpy_dtype(self.dtype)),
            **extra,
        }

    def expected(self, sink_logits: np.ndarray | None = None) -> np.ndarray:
        shape, out = self.shape, np.empty(self.q.shape)
        for row, (context, _) in enumerate(self.work):
            keys, values = np.repeat(self.kv[row], shape.group, axis=1)  # (heads, context, d)
            for t in range(self.query_start[row], self.query_start[row + 1]):
                scores = np.einsum("hd,hkd->hk", self.q[t].astype(np.float64), keys) * shape.scale
                distance = self.positions[t] - np.arange(context)
                scores = finish(shape, scores, distance)
                scores[:, ~visible(shape, np.arange(context), self.positions[t])] = -np.inf
                if sink_logits is not None:  # one score more, of no value
                    scores = np.concatenate([scores, sink_logits[:, None]], axis=1)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                out[t] = np.einsum("hk,hkd->hd", weights[:, :context], values)
        return out


def finish(shape: AttentionShape, scores: np.ndarray, distance: np.ndarray) -> np.ndarray:
    if shape.soft_cap:
        return shape.soft_cap * np.tanh(scores / shape.soft_cap)
    if shape.alibi:
        # Six heads: the slopes of four, then every second of those of eight.
        slopes = 2.0 ** -np.array([2, 4, 6, 8, 1, 3])
        return scores - slopes[:, None] * distance
    return scores


def visible(shape: AttentionShape, keys: np.ndarray, position: int) -> np.ndarray:
    mask = keys <= position
    if shape.window > 0:
        recent = keys > position - shape.window
        if shape.is_chunked:
            recent = keys // shape.window == position // shape.window
        mask &= recent | (keys < shape.sinks)
    return mask
