"""Macros of the int8 product that its kernels share: some rows of activations on some blocks.

They read weights in the packed layout of `group_linear.py` and activations of `activations.py`, and
leave to their kernel which rows (`TileRows`) meet which blocks. Products of codes are exact and
scales come in group by group, so that every way of cutting the work gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.activations import TILE, Int8Shape
from mlc_llm.kernels.cpu.int8_codes import quad_codes
from mlc_llm.kernels.cpu.isa import Isa, get_isa
from mlc_llm.kernels.cpu.linear import TileRows, num_blocks
from mlc_llm.kernels.cpu.vector_math import LANES, multiply_add, prefetch

# Bytes ahead of use at which weights are fetched (benchmarks/kernels.py, 2-core Zen 5).
PREFETCH_BYTES = 8192


@dataclass(frozen=True)
class Int8Macros:
    """The macros of a shape, and how many blocks they take at once.

    stream: `rows` (up to 8) rows on one block of 16 outputs; weights go from memory to registers.
    Its arguments: quantized activations, packed words, scales, result, `TileRows`, block of the
    weights, block of the outputs, rows.

    unpack: a tile of rows on `wide` blocks; the first tile leaves codes and scales in the cache.
    Its arguments: the arrays as above, but room for codes (quads, wide, 16) uint32 and scales
    (groups * scales per group, wide, 16) float32 before the result; block of the weights, block of
    the outputs, `TileRows`, number of the tile, whether it is the first, and whether it fetches
    lines of the blocks that come next.
    """

    stream: Any
    unpack: Any
    wide: int


def blocks_at_once(shape: Int8Shape) -> int:
    """Return how many blocks share a broadcast of activations: two where registers allow it."""
    isa = get_isa(shape.isa)
    return 2 if num_blocks(shape.out_features) % 2 == 0 and isa.lanes == LANES else 1


def _scale(stored: Any, lanes: int) -> Any:
    """Return a float32 scale, stored as int32, in every lane."""
    return T.broadcast(T.reinterpret("float32", stored), lanes)


def _dot4(isa: Isa, bits: int) -> Any:
    return isa.dot4_wide if bits == 8 else isa.dot4_small


def _tile_of(at: TileRows, i: Any) -> Any:
    return at.source(i) // TILE


def _entry(at: TileRows, i: Any, index: Any) -> Any:
    return index * TILE + at.source(i) % TILE


def int8_macros(shape: Int8Shape) -> Int8Macros:
    """Return the macros of kernels for a shape."""
    isa = get_isa(shape.isa)
    lanes, parts = isa.lanes, LANES // isa.lanes
    form, out_features, groups, words = shape.form, shape.out_features, shape.groups, shape.words
    per_group, quads_per_word = form.words_per_group, shape.quads_per_word
    low_words, quads_per_group = form.low_words, form.group_size // 4
    per_scale, has_minimum, sum_at = form.scales_per_group, form.has_minimum, shape.sum_at
    scale_at, start_at = shape.scale_at, shape.start_at
    dot4, wide, vector = _dot4(isa, form.bits), blocks_at_once(shape), f"float32x{lanes}"
    is_whole = out_features % LANES == 0

    @T.macro
    def store(
        out: T.handle,
        acc: T.handle,
        index: T.int32,
        at: T.meta_var,
        i: T.int32,
        b: T.int32,
    ) -> None:
        if at.exists(i):
            for p in T.unroll(parts):
                if is_whole:
                    if at.has_bias:
                        out[at.target(i), T.ramp(b * LANES + p * lanes, 1, lanes)] = acc[
                            index * parts + p, T.ramp(0, 1, lanes)
                        ] + at.bias(b * LANES + p * lanes, lanes)
                    else:
                        out[at.target(i), T.ramp(b * LANES + p * lanes, 1, lanes)] = acc[
                            index * parts + p, T.ramp(0, 1, lanes)
                        ]
                else:
                    for v in T.serial(lanes):
                        if b * LANES + p * lanes + v < out_features:
                            if at.has_bias:
                                out[at.target(i), b * LANES + p * lanes + v] = acc[
                                    index * parts + p, v
                                ] + at.bias(b * LANES + p * lanes + v, 1)
                            else:
                                out[at.target(i), b * LANES + p * lanes + v] = acc[
                                    index * parts + p, v
                                ]

    @T.macro
    def add_group(
        acc: T.handle,
        total: T.handle,
        scales: T.handle,
        quad: T.handle,
        b: T.int32,
        g: T.int32,
        at: T.meta_var,
        rows: T.meta_var,
    ) -> None:
        for i in T.unroll(rows):
            for p in T.unroll(parts):
                acc[i * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                    T.Cast(vector, total[i * parts + p, T.ramp(0, 1, lanes)]),
                    T.Cast(vector, scales[b, g * per_scale, T.ramp(p * lanes, 1, lanes)])
                    * _scale(quad[_tile_of(at, i), _entry(at, i, scale_at + g)], lanes),
                    acc[i * parts + p, T.ramp(0, 1, lanes)],
                    lanes,
                )
                if has_minimum:
                    acc[i * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                        T.Cast(vector, scales[b, g * per_scale + 1, T.ramp(p * lanes, 1, lanes)]),
                        _scale(quad[_tile_of(at, i), _entry(at, i, sum_at + g)], lanes),
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
        out: T.handle,
        at: T.meta_var,
        block: T.int32,
        b: T.int32,
        rows: T.meta_var,
    ) -> None:
        acc = T.alloc_buffer((rows * parts, lanes), "float32")
        total = T.alloc_buffer((rows * parts, lanes), "int32")
        odd = T.alloc_buffer((parts, lanes), "int32")
        for i in T.unroll(rows * parts):
            acc[i, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(groups):
            for i in T.unroll(rows):
                for p in T.unroll(parts):
                    total[i * parts + p, T.ramp(0, 1, lanes)] = T.broadcast(
                        quad[_tile_of(at, i), _entry(at, i, start_at + g)], lanes
                    )
            if rows == 1:
                for p in T.unroll(parts):
                    odd[p, T.ramp(0, 1, lanes)] = T.broadcast(T.int32(0), lanes)
            for w in T.unroll(per_group - low_words):
                fetch_ahead(packed, block * words + g * per_group + low_words + w)
            for w in T.unroll(low_words):
                fetch_ahead(packed, block * words + g * per_group + w)
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
                                        (block, g, p * lanes),
                                        lanes,
                                        w * quads_per_word + j,
                                    ),
                                    T.broadcast(
                                        quad[
                                            _tile_of(at, 0),
                                            _entry(
                                                at,
                                                0,
                                                g * quads_per_group + w * quads_per_word + j,
                                            ),
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
                                        (block, g, p * lanes),
                                        lanes,
                                        w * quads_per_word + j,
                                    ),
                                    T.broadcast(
                                        quad[
                                            _tile_of(at, i),
                                            _entry(
                                                at,
                                                i,
                                                g * quads_per_group + w * quads_per_word + j,
                                            ),
                                        ],
                                        lanes,
                                    ),
                                )
            if rows == 1:
                for p in T.unroll(parts):
                    total[p, T.ramp(0, 1, lanes)] = (
                        total[p, T.ramp(0, 1, lanes)] + odd[p, T.ramp(0, 1, lanes)]
                    )
            add_group(acc, total, scales, quad, block, g, at, rows)
        for i in T.unroll(rows):
            store(out, acc, i, at, i, b)

    @T.macro
    def unpacked_tile(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        codes: T.handle,
        factor: T.handle,
        out: T.handle,
        block: T.int32,
        b: T.int32,
        at: T.meta_var,
        m: T.int32,
        is_unpacking: T.meta_var,
        is_fetching: T.meta_var,
    ) -> None:
        acc = T.alloc_buffer((TILE * wide * parts, lanes), "float32")
        total = T.alloc_buffer((TILE * wide * parts, lanes), "int32")
        for i in T.unroll(TILE * wide * parts):
            acc[i, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(groups):
            for i in T.unroll(TILE):
                for r in T.unroll(wide * parts):
                    total[i * wide * parts + r, T.ramp(0, 1, lanes)] = T.broadcast(
                        quad[_tile_of(at, i), _entry(at, i, start_at + g)], lanes
                    )
            for r in T.unroll(wide):
                if is_fetching:
                    # The first tiles share the lines of the next blocks.
                    T.evaluate(
                        prefetch(
                            packed.access_ptr(
                                "r",
                                offset=((block + wide + r) * words + m * groups + g) * LANES,
                            )
                        )
                    )
                if is_unpacking:
                    for s in T.unroll(per_scale):
                        for p in T.unroll(parts):
                            factor[g * per_scale + s, r, T.ramp(p * lanes, 1, lanes)] = T.Cast(
                                vector,
                                scales[block + r, g * per_scale + s, T.ramp(p * lanes, 1, lanes)],
                            )
            for q in T.unroll(quads_per_group):
                if is_unpacking:
                    for r in T.unroll(wide):
                        for p in T.unroll(parts):
                            codes[g * quads_per_group + q, r, T.ramp(p * lanes, 1, lanes)] = (
                                quad_codes(form, packed, (block + r, g, p * lanes), lanes, q)
                            )
                for i in T.unroll(TILE):
                    for r in T.unroll(wide):
                        for p in T.unroll(parts):
                            total[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)] = dot4(
                                total[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)],
                                codes[g * quads_per_group + q, r, T.ramp(p * lanes, 1, lanes)],
                                T.broadcast(
                                    quad[_tile_of(at, i), _entry(at, i, g * quads_per_group + q)],
                                    lanes,
                                ),
                            )
            for i in T.unroll(TILE):
                for r in T.unroll(wide):
                    for p in T.unroll(parts):
                        acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                            T.Cast(vector, total[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)]),
                            factor[g * per_scale, r, T.ramp(p * lanes, 1, lanes)]
                            * _scale(quad[_tile_of(at, i), _entry(at, i, scale_at + g)], lanes),
                            acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)],
                            lanes,
                        )
                        if has_minimum:
                            acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)] = multiply_add(
                                factor[g * per_scale + 1, r, T.ramp(p * lanes, 1, lanes)],
                                _scale(quad[_tile_of(at, i), _entry(at, i, sum_at + g)], lanes),
                                acc[(i * wide + r) * parts + p, T.ramp(0, 1, lanes)],
                                lanes,
                            )
        for i in T.unroll(TILE):
            for r in T.unroll(wide):
                store(out, acc, i * wide + r, at, i, b + r)

    return Int8Macros(stream_block, unpacked_tile, wide)
