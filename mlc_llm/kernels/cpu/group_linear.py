"""Linear layers and embeddings on group-quantized weights, float path (float32 activations).

Packed layout: words (ceil(out / 16), words along in, 16) uint32 and scales (ceil(out / 16),
groups, 16): the portable words of 16 output rows interleaved. Both portable layouts (NK and KN)
pack to the same. Where groups have a minimum, it follows the scale: (ceil(out / 16), 2 * groups,
16). The sum over `in` runs in order, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.group_tiles import group_macros
from mlc_llm.kernels.cpu.linear import ROWS, bias_of, num_blocks, portable_array, rows_in_order
from mlc_llm.kernels.cpu.vector_math import LANES


def widen_codes(rows: int, in_features: int, form: GroupFormat, experts: int | None = None) -> Any:
    """Pack 3-bit words as 4-bit ones: portable words -> packed words of `with_byte_codes()`.

    experts: as for `linear.interleave`.
    """
    wide = form.with_byte_codes()
    blocks, groups, count = num_blocks(rows), form.num_groups(in_features), experts or 1
    narrow_words, wide_words = groups * form.words_per_group, groups * wide.words_per_group
    shape, value_of = portable_array(rows, narrow_words, form.is_transposed, experts)
    group_words, wide_group_words, per_word = (
        form.words_per_group,
        wide.words_per_group,
        form.values_per_word,
    )

    @T.prim_func(private=True, s_tir=True)
    def widen_codes_kernel(
        source: T.Buffer(shape, "uint32"),
        packed: T.Buffer((count * blocks, wide_words, LANES), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(count * blocks):
            for w in T.serial(wide_words):
                for v in T.serial(LANES):
                    packed[b, w, v] = T.uint32(0)
                    if b % blocks * LANES + v < rows:
                        for i in T.serial(8):
                            # Value k of the group moves from k * 3 of 10 a word to k * 4 of 8.
                            k = w % wide_group_words * 8 + i
                            column = w // wide_group_words * group_words + k // per_word
                            packed[b, w, v] = T.bitwise_or(
                                packed[b, w, v],
                                T.shift_left(
                                    T.bitwise_and(
                                        T.shift_right(
                                            value_of(
                                                source, b // blocks, b % blocks * LANES + v, column
                                            ),
                                            T.Cast("uint32", k % per_word * 3),
                                        ),
                                        T.uint32(7),
                                    ),
                                    T.Cast("uint32", i * 4),
                                ),
                            )

    return widen_codes_kernel


def matmul(
    out_features: int,
    in_features: int,
    form: GroupFormat,
    bias_dtype: str | None,
    rows: int = ROWS,
) -> Any:
    """Multiply: x (n, in) float32, packed words and scales[, bias (out)] -> (n, out) float32.

    rows: how many share a load of weights; their sums should fit into registers.
    """
    blocks = num_blocks(out_features)
    macros = group_macros(out_features, in_features, form, rows)
    stream_row, unpack_block, multiply_rows = (
        macros.stream_row,
        macros.unpack_block,
        macros.multiply_rows,
    )
    unpacked_inputs = macros.unpacked_inputs

    @T.macro
    def unpacked_block(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        bias: T.meta_var,
        n: T.int32,
        b: T.int32,
    ) -> None:
        weight = T.alloc_buffer((unpacked_inputs, LANES), "float32")
        unpack_block(words, scales, weight, b)
        for m in T.serial((n + rows - 1) // rows):
            multiply_rows(x, weight, out, rows_in_order(m * rows, n, bias), b)

    @T.macro
    def all_blocks(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        bias: T.meta_var,
        n: T.int32,
    ) -> None:
        if n == 1:
            for b in T.parallel(blocks):
                stream_row(x, words, scales, out, rows_in_order(0, n, bias), b, b)
        else:
            for b in T.parallel(blocks):
                unpacked_block(x, words, scales, out, bias, n, b)

    word_shape = form.word_shape(out_features, in_features)
    scale_shape = form.scale_shape(out_features, in_features)
    scale_dtype = form.scale_dtype

    if bias_dtype is not None:

        @T.prim_func(private=True, s_tir=True)
        def group_matmul_bias_kernel(
            x_handle: T.handle,
            words: T.Buffer(word_shape, "uint32"),
            scales: T.Buffer(scale_shape, scale_dtype),
            bias: T.Buffer((out_features,), bias_dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            x = T.match_buffer(x_handle, (n, in_features), "float32")
            out = T.match_buffer(out_handle, (n, out_features), "float32")
            all_blocks(x, words, scales, out, bias_of(bias), n)

        return group_matmul_bias_kernel

    @T.prim_func(private=True, s_tir=True)
    def group_matmul_kernel(
        x_handle: T.handle,
        words: T.Buffer(word_shape, "uint32"),
        scales: T.Buffer(scale_shape, scale_dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, in_features), "float32")
        out = T.match_buffer(out_handle, (n, out_features), "float32")
        all_blocks(x, words, scales, out, None, n)

    return group_matmul_kernel


def embed(num_embeddings: int, features: int, form: GroupFormat) -> Any:
    """Look rows up and dequantize: ids (n) int32, packed words, scales -> (n, features) float32."""
    word_shape = form.word_shape(num_embeddings, features)
    scale_shape = form.scale_shape(num_embeddings, features)
    group_size, per_group = form.group_size, form.scales_per_group
    zero_point, has_minimum = form.zero_point, form.has_minimum
    scale_dtype = form.scale_dtype

    def code_at(words: Any, row: Any, k: Any) -> Any:
        """Return one code as int32."""
        block, lane, first = row // LANES, row % LANES, k // group_size * form.words_per_group
        place = k % group_size

        def field(word: Any, shift: Any, bits: int) -> Any:
            shifted = T.shift_right(words[block, first + word, lane], T.Cast("uint32", shift))
            return T.bitwise_and(shifted, T.uint32((1 << bits) - 1))

        per_word = form.values_per_word
        code = field(place // per_word, place % per_word * form.low_bits, form.low_bits)
        if form.high_bits:
            word, shift = form.high_bits_at(place)
            high = field(form.low_words + word, shift, form.high_bits)
            code = T.bitwise_or(code, T.shift_left(high, T.uint32(form.low_bits)))
        return T.Cast("int32", code)

    @T.prim_func(private=True, s_tir=True)
    def group_embed_kernel(
        ids_handle: T.handle,
        words: T.Buffer(word_shape, "uint32"),
        scales: T.Buffer(scale_shape, scale_dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        ids = T.match_buffer(ids_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, features), "float32")
        for t in T.serial(n):
            for k in T.serial(features):
                out[t, k] = T.Cast("float32", code_at(words, ids[t], k) - zero_point) * T.Cast(
                    "float32",
                    scales[ids[t] // LANES, k // group_size * per_group, ids[t] % LANES],
                )
                if has_minimum:
                    out[t, k] = out[t, k] + T.Cast(
                        "float32",
                        scales[ids[t] // LANES, k // group_size * per_group + 1, ids[t] % LANES],
                    )

    return group_embed_kernel
