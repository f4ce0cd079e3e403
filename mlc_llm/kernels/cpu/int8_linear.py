"""Linear layers on group-quantized weights with activations quantized to int8.

Weights are codes of 4, 5, 6 or 8 bits in the packed layout of `group_linear.py`, activations come
from `activations.py`. A product of codes is exact, so only their rounding differs from the float
path. A group's minimum meets the sum of its activations once.
A result depends on its own token alone, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.activations import TILE, Int8Shape
from mlc_llm.kernels.cpu.int8_codes import quad_codes
from mlc_llm.kernels.cpu.isa import Isa, get_isa
from mlc_llm.kernels.cpu.linear import num_blocks
from mlc_llm.kernels.cpu.vector_math import LANES, multiply_add, prefetch

# Bytes ahead of use at which weights are fetched (benchmarks/kernels.py, 2-core Zen 5).
PREFETCH_BYTES = 8192
# From this many tokens on, weights are unpacked once for all of them. Fewer stream weights, which
# from memory is 1.02-1.2 x as fast at 16 to 40 tokens (minima of alternating runs, 2-core Zen 5).
GEMM_TOKENS = 41


def _scale(stored: Any, lanes: int) -> Any:
    """Return a float32 scale, stored as int32, in every lane."""
    return T.broadcast(T.reinterpret("float32", stored), lanes)


def _dot4(isa: Isa, bits: int) -> Any:
    return isa.dot4_wide if bits == 8 else isa.dot4_small


def matmul(shape: Int8Shape, bias_dtype: str | None) -> Any:
    """Multiply: quantized activations of n tokens, packed words and scales[, bias (out)]
    -> (n, out) float32.
    """
    isa = get_isa(shape.isa)
    lanes, parts = isa.lanes, LANES // isa.lanes
    bits, out_features = shape.form.bits, shape.out_features
    blocks, groups, words, quads = (
        num_blocks(out_features),
        shape.groups,
        shape.words,
        shape.quads,
    )
    per_group, quads_per_word = shape.form.words_per_group, shape.quads_per_word
    form, low_words, quads_per_group = shape.form, shape.form.low_words, shape.form.group_size // 4
    per_scale, has_minimum, sum_at = form.scales_per_group, form.has_minimum, shape.sum_at
    scale_dtype, has_bias = shape.form.scale_dtype, bias_dtype is not None
    store_dtype = bias_dtype or "float32"
    scale_at, start_at, width = shape.scale_at, shape.start_at, shape.width
    dot4 = _dot4(isa, bits)
    vector = f"float32x{lanes}"
    # Two blocks share a broadcast of activations where registers allow it.
    wide = 2 if blocks % 2 == 0 and lanes == LANES else 1
    is_whole = out_features % LANES == 0

    @T.macro
    def store(
        bias: T.handle,
        out: T.handle,
        acc: T.handle,
        index: T.int32,
        row: T.int32,
        n: T.int32,
        b: T.int32,
    ) -> None:
        if row < n:
            for p in T.unroll(parts):
                if is_whole:
                    if has_bias:
                        out[row, T.ramp(b * LANES + p * lanes, 1, lanes)] = acc[
                            index * parts + p, T.ramp(0, 1, lanes)
                        ] + T.Cast(vector, bias[T.ramp(b * LANES + p * lanes, 1, lanes)])
                    else:
                        out[row, T.ramp(b * LANES + p * lanes, 1, lanes)] = acc[
                            index * parts + p, T.ramp(0, 1, lanes)
                        ]
                else:
                    for v in T.serial(lanes):
                        if b * LANES + p * lanes + v < out_features:
                            if has_bias:
                                out[row, b * LANES + p * lanes + v] = acc[
                                    index * parts + p, v
                                ] + T.Cast("float32", bias[b * LANES + p * lanes + v])
                            else:
                                out[row, b * LANES + p * lanes + v] = acc[index * parts + p, v]

    @T.macro
    def add_group(
        acc: T.handle,
        total: T.handle,
        scales: T.handle,
        quad: T.handle,
        b: T.int32,
        g: T.int32,
        m: T.int32,
        rows: T.meta_var,
    ) -> None:
        for i in T.unroll(rows):
            for p in T.unroll(parts):
                acc[i * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                    T.Cast(vector, total[i * parts + p, T.ramp(0, 1, lanes)]),
                    T.Cast(vector, scales[b, g * per_scale, T.ramp(p * lanes, 1, lanes)])
                    * _scale(quad[m + i // TILE, (scale_at + g) * TILE + i % TILE], lanes),
                    acc[i * parts + p, T.ramp(0, 1, lanes)],
                    lanes,
                )
                if has_minimum:
                    acc[i * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                        T.Cast(vector, scales[b, g * per_scale + 1, T.ramp(p * lanes, 1, lanes)]),
                        _scale(quad[m + i // TILE, (sum_at + g) * TILE + i % TILE], lanes),
                        acc[i * parts + p, T.ramp(0, 1, lanes)],
                        lanes,
                    )

    @T.macro
    def fetch_ahead(packed: T.handle, word: T.int32) -> None:
        T.evaluate(prefetch(packed.access_ptr("r", offset=word * LANES + PREFETCH_BYTES // 4)))

    @T.macro
    def stream_block(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
        b: T.int32,
        m: T.int32,
        rows: T.meta_var,
    ) -> None:
        """Rows (up to 8) of tokens from tile m on; weights go from memory to registers."""
        acc = T.alloc_buffer((rows * parts, lanes), "float32")
        total = T.alloc_buffer((rows * parts, lanes), "int32")
        odd = T.alloc_buffer((parts, lanes), "int32")
        for i in T.unroll(rows * parts):
            acc[i, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(groups):
            for i in T.unroll(rows):
                for p in T.unroll(parts):
                    total[i * parts + p, T.ramp(0, 1, lanes)] = T.broadcast(
                        quad[m + i // TILE, (start_at + g) * TILE + i % TILE], lanes
                    )
            if rows == 1:
                for p in T.unroll(parts):
                    odd[p, T.ramp(0, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for w in T.unroll(per_group - low_words):
                fetch_ahead(packed, b * words + g * per_group + low_words + w)
            for w in T.unroll(low_words):
                fetch_ahead(packed, b * words + g * per_group + w)
                for j in T.unroll(quads_per_word):
                    for i in T.unroll(rows):
                        for p in T.unroll(parts):
                            if rows == 1 and (w * quads_per_word + j) % 2 == 1:
                                # A second chain hides the latency of a single token.
                                odd[p, T.ramp(0, 1, lanes)] = dot4(
                                    odd[p, T.ramp(0, 1, lanes)],
                                    quad_codes(
                                        form,
                                        packed,
                                        (b, g, p * lanes),
                                        lanes,
                                        w * quads_per_word + j,
                                    ),
                                    T.broadcast(
                                        quad[
                                            m, (g * quads_per_group + w * quads_per_word + j) * TILE
                                        ],
                                        lanes,
                                    ),
                                )
                            else:
                                total[i * parts + p, T.ramp(0, 1, lanes)] = dot4(
                                    total[i * parts + p, T.ramp(0, 1, lanes)],
                                    quad_codes(
                                        form,
                                        packed,
                                        (b, g, p * lanes),
                                        lanes,
                                        w * quads_per_word + j,
                                    ),
                                    T.broadcast(
                                        quad[
                                            m + i // TILE,
                                            (g * quads_per_group + w * quads_per_word + j) * TILE
                                            + i % TILE,
                                        ],
                                        lanes,
                                    ),
                                )
            if rows == 1:
                for p in T.unroll(parts):
                    total[p, T.ramp(0, 1, lanes)] = (
                        total[p, T.ramp(0, 1, lanes)] + odd[p, T.ramp(0, 1, lanes)]
                    )
            add_group(acc, total, scales, quad, b, g, m, rows)
        for i in T.unroll(rows):
            store(bias, out, acc, i, m * TILE + i, n, b)

    @T.macro
    def unpacked_tile(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        bias: T.handle,
        codes: T.handle,
        factor: T.handle,
        out: T.handle,
        n: T.int32,
        first: T.int32,
        m: T.int32,
        is_unpacking: T.meta_var,
        is_fetching: T.meta_var,
    ) -> None:
        """A tile of tokens on `wide` blocks; the first one leaves their codes in the cache."""
        acc = T.alloc_buffer((TILE * wide * parts, lanes), "float32")
        total = T.alloc_buffer((TILE * wide * parts, lanes), "int32")
        for i in T.unroll(TILE * wide * parts):
            acc[i, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(groups):
            for i in T.unroll(TILE):
                for r in T.unroll(wide * parts):
                    total[i * wide * parts + r, T.ramp(0, 1, lanes)] = T.broadcast(
                        quad[m, (start_at + g) * TILE + i], lanes
                    )
            for r in T.unroll(wide):
                if is_fetching:
                    # The first tiles share the lines of the next blocks.
                    T.evaluate(
                        prefetch(
                            packed.access_ptr(
                                "r",
                                offset=((first + wide + r) * words + m * groups + g) * LANES,
                            )
                        )
                    )
                if is_unpacking:
                    for s in T.unroll(per_scale):
                        for p in T.unroll(parts):
                            factor[g * per_scale + s, r, T.ramp(p * lanes, 1, lanes)] = T.Cast(
                                vector,
                                scales[first + r, g * per_scale + s, T.ramp(p * lanes, 1, lanes)],
                            )
            for q in T.unroll(quads_per_group):
                if is_unpacking:
                    for r in T.unroll(wide):
                        for p in T.unroll(parts):
                            codes[g * quads_per_group + q, r, T.ramp(p * lanes, 1, lanes)] = (
                                quad_codes(form, packed, (first + r, g, p * lanes), lanes, q)
                            )
                for i in T.unroll(TILE):
                    for r in T.unroll(wide):
                        for p in T.unroll(parts):
                            total[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)] = dot4(
                                total[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)],
                                codes[g * quads_per_group + q, r, T.ramp(p * lanes, 1, lanes)],
                                T.broadcast(quad[m, (g * quads_per_group + q) * TILE + i], lanes),
                            )
            for i in T.unroll(TILE):
                for r in T.unroll(wide):
                    for p in T.unroll(parts):
                        acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                            T.Cast(vector, total[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)]),
                            factor[g * per_scale, r, T.ramp(p * lanes, 1, lanes)]
                            * _scale(quad[m, (scale_at + g) * TILE + i], lanes),
                            acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)],
                            lanes,
                        )
                        if has_minimum:
                            acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                                factor[g * per_scale + 1, r, T.ramp(p * lanes, 1, lanes)],
                                _scale(quad[m, (sum_at + g) * TILE + i], lanes),
                                acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)],
                                lanes,
                            )
        for i in T.unroll(TILE):
            for r in T.unroll(wide):
                store(bias, out, acc, i * wide + r, m * TILE + i, n, first + r)

    @T.macro
    def unpacked_blocks(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
        first: T.int32,
    ) -> None:
        """All tokens on `wide` blocks."""
        codes = T.alloc_buffer((quads, wide, LANES), "uint32")
        factor = T.alloc_buffer((groups * per_scale, wide, LANES), "float32")
        operands = T.meta_var((quad, packed, scales, bias, codes, factor, out, n, first))
        tiles = T.meta_var((n + TILE - 1) // TILE)
        unpacked_tile(*operands, 0, True, True)
        for m in T.serial(T.min(tiles, per_group) - 1):
            unpacked_tile(*operands, m + 1, False, True)
        for m in T.serial(T.max(tiles - per_group, 0)):
            unpacked_tile(*operands, per_group + m, False, False)

    @T.macro
    def all_blocks(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
    ) -> None:
        if n == 1:
            for b in T.parallel(blocks):
                stream_block(quad, packed, scales, bias, out, n, b, 0, 1)
        elif n <= 2:
            for b in T.parallel(blocks):
                stream_block(quad, packed, scales, bias, out, n, b, 0, 2)
        elif n <= TILE:
            for b in T.parallel(blocks):
                stream_block(quad, packed, scales, bias, out, n, b, 0, TILE)
        elif n < GEMM_TOKENS:
            for b in T.parallel(blocks):
                if isa.tokens == TILE:
                    for m in T.serial((n + TILE - 1) // TILE):
                        stream_block(quad, packed, scales, bias, out, n, b, m, TILE)
                else:
                    # Eight tokens share a load of weights; what is left is at most four.
                    for m in T.serial((n + TILE - 1) // (2 * TILE)):
                        stream_block(quad, packed, scales, bias, out, n, b, 2 * m, 2 * TILE)
                    if n % (2 * TILE) > 0:
                        if n % (2 * TILE) <= TILE:
                            stream_block(
                                quad, packed, scales, bias, out, n, b, n // (2 * TILE) * 2, TILE
                            )
        else:
            for b in T.parallel(blocks // wide):
                unpacked_blocks(quad, packed, scales, bias, out, n, b * wide)

    word_shape = (blocks, words, LANES)
    scale_shape = (blocks, groups * per_scale, LANES)

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def int8_matmul_bias_kernel(
            quad_handle: T.handle,
            packed: T.Buffer(word_shape, "uint32"),
            scales: T.Buffer(scale_shape, scale_dtype),
            bias: T.Buffer((out_features,), store_dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            tiles = T.int32()
            quad = T.match_buffer(quad_handle, (tiles, width * TILE), "int32")
            out = T.match_buffer(out_handle, (n, out_features), "float32")
            all_blocks(quad, packed, scales, bias, out, n)

        return int8_matmul_bias_kernel

    @T.prim_func(private=True, s_tir=True)
    def int8_matmul_kernel(
        quad_handle: T.handle,
        packed: T.Buffer(word_shape, "uint32"),
        scales: T.Buffer(scale_shape, scale_dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        tiles = T.int32()
        quad = T.match_buffer(quad_handle, (tiles, width * TILE), "int32")
        out = T.match_buffer(out_handle, (n, out_features), "float32")
        all_blocks(quad, packed, scales, scales, out, n)

    return int8_matmul_kernel
