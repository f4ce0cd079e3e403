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
from mlc_llm.kernels.cpu.int8_tiles import int8_macros
from mlc_llm.kernels.cpu.isa import get_isa
from mlc_llm.kernels.cpu.linear import bias_of, num_blocks, padded_rows
from mlc_llm.kernels.cpu.vector_math import LANES

# From this many tokens on, weights are unpacked once for all of them. Fewer stream weights, which
# from memory is 1.02-1.2 x as fast at 16 to 40 tokens (minima of alternating runs, 2-core Zen 5).
GEMM_TOKENS = 41


def matmul(shape: Int8Shape, bias_dtype: str | None) -> Any:
    """Multiply: quantized activations of n tokens, packed words and scales[, bias (out)]
    -> (n, out) float32.
    """
    out_features, form = shape.out_features, shape.form
    blocks, groups, words, quads = (
        num_blocks(out_features),
        shape.groups,
        shape.words,
        shape.quads,
    )
    per_group, per_scale, scale_dtype = (
        form.words_per_group,
        form.scales_per_group,
        form.scale_dtype,
    )
    tokens, width, macros = get_isa(shape.isa).tokens, shape.width, int8_macros(shape)
    stream, unpack, wide = macros.stream, macros.unpack, macros.wide

    @T.macro
    def stream_block(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        out: T.handle,
        bias: T.meta_var,
        n: T.int32,
        b: T.int32,
        m: T.int32,
        rows: T.meta_var,
    ) -> None:
        """Rows (up to 8) of tokens from tile m on."""
        stream(quad, packed, scales, out, padded_rows(m * TILE, n, bias), b, b, rows)

    @T.macro
    def unpacked_blocks(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        out: T.handle,
        bias: T.meta_var,
        n: T.int32,
        first: T.int32,
    ) -> None:
        """All tokens on `wide` blocks."""
        codes = T.alloc_buffer((quads, wide, LANES), "uint32")
        factor = T.alloc_buffer((groups * per_scale, wide, LANES), "float32")
        operands = T.meta_var((quad, packed, scales, codes, factor, out, first, first))
        tiles = T.meta_var((n + TILE - 1) // TILE)
        rows = T.meta_var(lambda m: padded_rows(m * TILE, n, bias))
        unpack(*operands, rows(0), 0, True, True)
        for m in T.serial(T.min(tiles, per_group) - 1):
            unpack(*operands, rows(m + 1), m + 1, False, True)
        for m in T.serial(T.max(tiles - per_group, 0)):
            unpack(*operands, rows(per_group + m), per_group + m, False, False)

    @T.macro
    def all_blocks(
        quad: T.handle,
        packed: T.handle,
        scales: T.handle,
        out: T.handle,
        bias: T.meta_var,
        n: T.int32,
    ) -> None:
        if n == 1:
            for b in T.parallel(blocks):
                stream_block(quad, packed, scales, out, bias, n, b, 0, 1)
        elif n <= 2:
            for b in T.parallel(blocks):
                stream_block(quad, packed, scales, out, bias, n, b, 0, 2)
        elif n <= TILE:
            for b in T.parallel(blocks):
                stream_block(quad, packed, scales, out, bias, n, b, 0, TILE)
        elif n < GEMM_TOKENS:
            for b in T.parallel(blocks):
                if tokens == TILE:
                    for m in T.serial((n + TILE - 1) // TILE):
                        stream_block(quad, packed, scales, out, bias, n, b, m, TILE)
                else:
                    # Eight tokens share a load of weights; what is left is at most four.
                    for m in T.serial((n + TILE - 1) // (2 * TILE)):
                        stream_block(quad, packed, scales, out, bias, n, b, 2 * m, 2 * TILE)
                    if n % (2 * TILE) > 0:
                        if n % (2 * TILE) <= TILE:
                            stream_block(
                                quad, packed, scales, out, bias, n, b, n // (2 * TILE) * 2, TILE
                            )
        else:
            for b in T.parallel(blocks // wide):
                unpacked_blocks(quad, packed, scales, out, bias, n, b * wide)

    word_shape = (blocks, words, LANES)
    scale_shape = (blocks, groups * per_scale, LANES)

    if bias_dtype is not None:

        @T.prim_func(private=True, s_tir=True)
        def int8_matmul_bias_kernel(
            quad_handle: T.handle,
            packed: T.Buffer(word_shape, "uint32"),
            scales: T.Buffer(scale_shape, scale_dtype),
            bias: T.Buffer((out_features,), bias_dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            tiles = T.int32()
            quad = T.match_buffer(quad_handle, (tiles, width * TILE), "int32")
            out = T.match_buffer(out_handle, (n, out_features), "float32")
            all_blocks(quad, packed, scales, out, bias_of(bias), n)

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
        all_blocks(quad, packed, scales, out, None, n)

    return int8_matmul_kernel
