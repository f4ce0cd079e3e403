"""Sequences in pages, and what attention makes of them by definition."""

import copy
import dataclasses

import numpy as np

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu.attention import AttentionShape

PAGE = 16
# (context, new tokens) of each sequence; contexts around the sizes of pages, key blocks and parts.
RAGGED = [(5, 5), (130, 1), (70, 37), (64, 64), (17, 3), (65, 2), (600, 5)]
DECODE = [(length, 1) for length in (1, 16, 17, 63, 64, 65, 200, 511, 512, 513, 1100)]

GQA = AttentionShape(8, 2, 16, PAGE, "float32", 0.25, -1)
SHAPES = {
    "gqa": GQA,
    "gqa float16": dataclasses.replace(GQA, kv_dtype="float16"),
    "mha": AttentionShape(4, 4, 8, PAGE, "float32", 0.3, -1),
    "odd sizes": AttentionShape(3, 1, 20, PAGE, "float16", 0.2, -1),
    "two lanes": AttentionShape(5, 1, 6, PAGE, "float32", 0.4, -1),
    "group larger than a tile": AttentionShape(20, 1, 8, PAGE, "float32", 0.3, -1),
    "window": dataclasses.replace(GQA, window=8),
    "window longer than a block": dataclasses.replace(GQA, window=70),
    "window and sinks": dataclasses.replace(GQA, window=8, sinks=4),
    "sinks over blocks": dataclasses.replace(GQA, window=3, sinks=67),
    "chunks": dataclasses.replace(GQA, window=24, is_chunked=True),
    "chunks longer than a tile": dataclasses.replace(GQA, window=100, is_chunked=True),
    "few registers": dataclasses.replace(GQA, span=1),
    "soft cap": dataclasses.replace(GQA, soft_cap=1.5),
    "int8": dataclasses.replace(GQA, kv_dtype="int8"),
    "int8, odd sizes": AttentionShape(3, 1, 20, PAGE, "int8", 0.2, -1),
}
# Shape and dtype of the sink logits.
SINK_LOGITS = {
    "sink logits, window": (dataclasses.replace(GQA, window=70), "float32"),
    "sink logits, int8, odd sizes": (SHAPES["int8, odd sizes"], "bfloat16"),
}


class Step:
    """Random inputs of one step over sequences whose pages lie in any order."""

    def __init__(self, rng, shape, work, sink_logits=None):
        self.shape, self.work, self.sink_logits = shape, work, sink_logits
        kv_dtype = numpy_dtype(shape.kv_dtype)
        counts = [-(-context // PAGE) for context, _ in work]
        order = iter(rng.permutation(sum(counts) + 3).tolist())
        self.page_table = np.full((len(work), max(counts) + 1), 0, np.int32)
        # Slots that hold no token may hold anything, even this.
        kv = np.full((sum(counts) + 3, 2, shape.num_kv_heads, PAGE * shape.head_dim), np.nan)
        self.keys, self.values = [], []
        self.scales = np.full((sum(counts) + 3, 2, shape.num_kv_heads, PAGE), np.nan, np.float32)
        for row, (context, _) in enumerate(work):
            size = (2, context, shape.num_kv_heads, shape.head_dim)
            if shape.is_int8:
                keys, values = rng.integers(-127, 128, size).astype(np.float64)
                factors = rng.uniform(0.005, 0.02, (*size[:3], 1)).astype(np.float32)
            else:
                keys, values = rng.standard_normal(size).astype(kv_dtype)
                factors = np.ones((*size[:3], 1), np.float32)
            self.keys.append(keys.astype(np.float64) * factors[0])
            self.values.append(values.astype(np.float64) * factors[1])
            for place in range(counts[row]):
                page = self.page_table[row, place] = next(order)
                part = slice(place * PAGE, min((place + 1) * PAGE, context))
                length = part.stop - part.start
                k = kv[page, 0].reshape(shape.num_kv_heads, shape.head_dim, PAGE)
                v = kv[page, 1].reshape(shape.num_kv_heads, PAGE, shape.head_dim)
                k[:, :, :length] = keys[part].transpose(1, 2, 0)
                v[:, :length] = values[part].transpose(1, 0, 2)
                self.scales[page, :, :, :length] = factors[:, part, :, 0].transpose(0, 2, 1)
        self.pages = int8_pages(kv, self.scales) if shape.is_int8 else kv.astype(kv_dtype)
        new = [count for _, count in work]
        self.query_start = np.cumsum([0, *new]).astype(np.int32)
        self.context_len = np.asarray([context for context, _ in work], np.int32)
        self.positions = np.concatenate(
            [np.arange(context - count, context) for context, count in work]
        ).astype(np.int32)
        n = sum(new)
        self.q = (2 * rng.standard_normal((n, shape.num_heads, shape.head_dim))).astype(np.float32)

    def cut(self, pieces):
        """Return a step whose sequences are pieces begin .. end of this one's only sequence."""
        other = copy.copy(self)
        tokens = np.concatenate([np.arange(begin, end) for begin, end in pieces])
        other.q, other.positions = self.q[tokens], self.positions[tokens]
        other.query_start = np.cumsum([0, *(end - begin for begin, end in pieces)]).astype(np.int32)
        other.context_len = self.positions[[end - 1 for _, end in pieces]] + np.int32(1)
        other.page_table = np.repeat(self.page_table, len(pieces), axis=0)
        return other, tokens

    def run(self, kernel):
        inputs = (
            self.q,
            self.pages,
            self.query_start,
            self.page_table,
            self.context_len,
            self.positions,
            *(() if self.sink_logits is None else (self.sink_logits,)),
        )
        n, heads, head_dim = self.q.shape
        return kernel(*inputs, shape=(n, heads * head_dim)).reshape(n, heads, head_dim)

    def expected(self):
        out = np.empty(self.q.shape)
        for row, (context, count) in enumerate(self.work):
            first = self.query_start[row]
            for token in range(first, first + count):
                sees = visible(self.shape, np.arange(context), self.positions[token])
                out[token] = self.attend(self.q[token], row, sees)
        return out

    def attend(self, q, row, sees):
        group = self.shape.group
        keys = np.repeat(self.keys[row][sees], group, axis=1)
        values = np.repeat(self.values[row][sees], group, axis=1)
        scores = np.einsum("hd,khd->hk", q.astype(np.float64), keys) * self.shape.scale
        if self.shape.soft_cap:
            scores = self.shape.soft_cap * np.tanh(scores / self.shape.soft_cap)
        if self.sink_logits is not None:  # one score more, of a value of zeros
            sinks = self.sink_logits.astype(np.float64)
            scores = np.concatenate([scores, sinks[:, None]], axis=1)
            values = np.concatenate([values, np.zeros((1, *values.shape[1:]))])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("hk,khd->hd", weights, values)


def int8_pages(codes, scales):
    """Return pages as the int8 cache stores them: codes, then the bytes of the scales."""
    stored = np.nan_to_num(codes, nan=99).astype(np.int8)
    return np.concatenate([stored, scales.view(np.int8)], axis=-1)


def visible(shape, keys, position):
    mask = keys <= position
    if shape.window > 0:
        recent = keys > position - shape.window
        if shape.is_chunked:
            recent = keys // shape.window == position // shape.window
        mask &= recent | (keys < shape.sinks)
    return mask


def make_sink_logits(rng, shape, dtype):
    """Return logits (heads) between those that take nothing and those that take everything."""
    logits = 4 * rng.standard_normal(shape.num_heads)
    logits[:3] = -200, 3, 200
    return logits.astype(numpy_dtype(dtype))


def check_against_dense(kernel, rng, shape, work, sink_logits=None):
    """Assert that a step is what a dense softmax makes of it."""
    step = Step(rng, shape, work, sink_logits)
    np.testing.assert_allclose(step.run(kernel), step.expected(), rtol=1e-4, atol=3e-6)


def check_independence(kernel, rng, shape, sink_logits=None):
    """Assert that a token is the same to the bit alone, in chunks, and beside others."""
    step = Step(rng, shape, [(1100, 700)], sink_logits)
    together = step.run(kernel)
    single = [0, 15, 16, 111, 112, 113, 200, 623, 624, 625, 680, 699]  # keys: 400 more
    for pieces in (
        [(token, token + 1) for token in single],
        [(625, 626)],
        [(0, 1), (1, 7), (7, 100), (100, 101)],
        [(90, 150), (624, 625), (300, 700)],
    ):
        part, tokens = step.cut(pieces)
        np.testing.assert_array_equal(part.run(kernel), together[tokens])
