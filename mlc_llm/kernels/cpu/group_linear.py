"""Linear layers and embeddings on group-quantized weights, float path (float32 activations).

Packed layout: words (ceil(out / 16), words along in, 16) uint32 and scales (ceil(out / 16),
groups, 16): the portable words of 16 output rows interleaved. Both portable layouts (NK and KN)
pack to the same. The sum over `in` runs in order, whatever the number of tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.linear import ROWS, num_blocks, store_tile
from mlc_llm.kernels.cpu.vector_math import LANES, multiply_add, splat


@dataclass(frozen=True)
class GroupFormat:
    """Numbers of a group quantization that its kernels need."""

    bits: int
    group_size: int
    scale_dtype: str
    is_transposed: bool  # portable arrays are (in, out): the KN layout
    code_of_zero: int | None = None  # where it is not the middle of the codes

    @property
    def values_per_word(self) -> int:
        """Return how many values one uint32 holds."""
        return 32 // self.bits

    @property
    def words_per_group(self) -> int:
        """Return how many uint32 one group takes."""
        return self.group_size // self.values_per_word

    @property
    def zero_point(self) -> int:
        """Return the code of zero."""
        return (1 << (self.bits - 1)) - 1 if self.code_of_zero is None else self.code_of_zero

    def with_byte_codes(self) -> GroupFormat:
        """Return the format in which codes fall into bytes: 3-bit codes move to 4 bits."""
        if self.bits != 3:
            return self
        return dataclasses.replace(self, bits=4, code_of_zero=self.zero_point)

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups along the input dimension."""
        return -(-in_features // self.group_size)

    def word_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return the shape of the packed words."""
        words = self.num_groups(in_features) * self.words_per_group
        return (num_blocks(out_features), words, LANES)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return the shape of the packed scales."""
        return (num_blocks(out_features), self.num_groups(in_features), LANES)


def widen_codes(rows: int, in_features: int, form: GroupFormat) -> Any:
    """Pack 3-bit words as 4-bit ones: portable words -> packed words of `with_byte_codes()`."""
    wide = form.with_byte_codes()
    blocks, groups = num_blocks(rows), form.num_groups(in_features)
    narrow_words, wide_words = groups * form.words_per_group, groups * wide.words_per_group
    is_transposed = form.is_transposed
    shape = (narrow_words, rows) if is_transposed else (rows, narrow_words)
    group_words, wide_group_words, per_word = (
        form.words_per_group,
        wide.words_per_group,
        form.values_per_word,
    )

    @T.prim_func(private=True, s_tir=True)
    def widen_codes_kernel(
        source: T.Buffer(shape, "uint32"),
        packed: T.Buffer((blocks, wide_words, LANES), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            for w in T.serial(wide_words):
                for v in T.serial(LANES):
                    packed[b, w, v] = T.uint32(0)
                    if b * LANES + v < rows:
                        for i in T.serial(8):
                            # Value k of the group moves from k * 3 of 10 a word to k * 4 of 8.
                            k = w % wide_group_words * 8 + i
                            column = w // wide_group_words * group_words + k // per_word
                            packed[b, w, v] = T.bitwise_or(
                                packed[b, w, v],
                                T.shift_left(
                                    T.bitwise_and(
                                        T.shift_right(
                                            source[column, b * LANES + v]
                                            if is_transposed
                                            else source[b * LANES + v, column],
                                            T.Cast("uint32", k % per_word * 3),
                                        ),
                                        T.uint32(7),
                                    ),
                                    T.Cast("uint32", i * 4),
                                ),
                            )

    return widen_codes_kernel


def _dequantize(word: Any, scale: Any, offset: Any, shift: int, bits: int) -> Any:
    """Return the values at `shift` of 16 words: code * scale + offset."""
    code = T.bitwise_and(
        T.shift_right(word, T.broadcast(T.uint32(shift), LANES)),
        T.broadcast(T.uint32((1 << bits) - 1), LANES),
    )
    return multiply_add(T.Cast(f"float32x{LANES}", T.Cast(f"int32x{LANES}", code)), scale, offset)


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
    groups = form.num_groups(in_features)
    vector = f"float32x{LANES}"
    bits, group_size, per_word = form.bits, form.group_size, form.values_per_word
    words_per_group, zero_point = form.words_per_group, form.zero_point
    has_bias = bias_dtype is not None
    store_dtype = bias_dtype or "float32"

    @T.macro
    def load_scale(scales: T.handle, scale: T.handle, b: T.int32, g: T.int32) -> None:
        scale[0, T.ramp(0, 1, LANES)] = T.Cast(vector, scales[b, g, T.ramp(0, 1, LANES)])
        scale[1, T.ramp(0, 1, LANES)] = scale[0, T.ramp(0, 1, LANES)] * splat(
            T.float32(-zero_point)
        )

    @T.macro
    def gemv_block(
        x: T.handle, words: T.handle, scales: T.handle, bias: T.handle, out: T.handle, b: T.int32
    ) -> None:
        acc = T.alloc_buffer((1, LANES), "float32")
        scale = T.alloc_buffer((2, LANES), "float32")
        acc[0, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for g in T.serial(groups):
            load_scale(scales, scale, b, g)
            for w in T.serial(words_per_group):
                for r in T.unroll(per_word):
                    if g * group_size + w * per_word + r < in_features:
                        acc[0, T.ramp(0, 1, LANES)] = multiply_add(
                            splat(x[0, g * group_size + w * per_word + r]),
                            _dequantize(
                                words[b, g * words_per_group + w, T.ramp(0, 1, LANES)],
                                scale[0, T.ramp(0, 1, LANES)],
                                scale[1, T.ramp(0, 1, LANES)],
                                r * bits,
                                bits,
                            ),
                            acc[0, T.ramp(0, 1, LANES)],
                        )
        store_tile(out, bias, acc, 1, b, 0, 1, out_features, store_dtype, has_bias)

    @T.macro
    def gemm_block(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
        b: T.int32,
    ) -> None:
        weight = T.alloc_buffer((groups * group_size, LANES), "float32")
        scale = T.alloc_buffer((2, LANES), "float32")
        acc = T.alloc_buffer((rows, LANES), "float32")
        for g in T.serial(groups):
            load_scale(scales, scale, b, g)
            for w in T.serial(words_per_group):
                for r in T.unroll(per_word):
                    weight[g * group_size + w * per_word + r, T.ramp(0, 1, LANES)] = _dequantize(
                        words[b, g * words_per_group + w, T.ramp(0, 1, LANES)],
                        scale[0, T.ramp(0, 1, LANES)],
                        scale[1, T.ramp(0, 1, LANES)],
                        r * bits,
                        bits,
                    )
        for m in T.serial((n + rows - 1) // rows):
            for i in T.unroll(rows):
                acc[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
            for k in T.serial(in_features):
                for i in T.unroll(rows):
                    acc[i, T.ramp(0, 1, LANES)] = multiply_add(
                        splat(x[T.min(m * rows + i, n - 1), k]),
                        weight[k, T.ramp(0, 1, LANES)],
                        acc[i, T.ramp(0, 1, LANES)],
                    )
            store_tile(out, bias, acc, n, b, m * rows, rows, out_features, store_dtype, has_bias)

    @T.macro
    def all_blocks(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
    ) -> None:
        if n == 1:
            for b in T.parallel(blocks):
                gemv_block(x, words, scales, bias, out, b)
        else:
            for b in T.parallel(blocks):
                gemm_block(x, words, scales, bias, out, n, b)

    word_shape = form.word_shape(out_features, in_features)
    scale_shape = form.scale_shape(out_features, in_features)
    scale_dtype = form.scale_dtype

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def group_matmul_bias_kernel(
            x_handle: T.handle,
            words: T.Buffer(word_shape, "uint32"),
            scales: T.Buffer(scale_shape, scale_dtype),
            bias: T.Buffer((out_features,), store_dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            x = T.match_buffer(x_handle, (n, in_features), "float32")
            out = T.match_buffer(out_handle, (n, out_features), "float32")
            all_blocks(x, words, scales, bias, out, n)

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
        all_blocks(x, words, scales, scales, out, n)

    return group_matmul_kernel


def embed(num_embeddings: int, features: int, form: GroupFormat) -> Any:
    """Look rows up and dequantize: ids (n) int32, packed words, scales -> (n, features) float32."""
    word_shape = form.word_shape(num_embeddings, features)
    scale_shape = form.scale_shape(num_embeddings, features)
    bits, group_size, per_word = form.bits, form.group_size, form.values_per_word
    mask, zero_point = (1 << form.bits) - 1, form.zero_point
    scale_dtype = form.scale_dtype

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
                out[t, k] = T.Cast(
                    "float32",
                    T.Cast(
                        "int32",
                        T.bitwise_and(
                            T.shift_right(
                                words[ids[t] // LANES, k // per_word, ids[t] % LANES],
                                T.Cast("uint32", (k % per_word) * bits),
                            ),
                            T.uint32(mask),
                        ),
                    )
                    - zero_point,
                ) * T.Cast("float32", scales[ids[t] // LANES, k // group_size, ids[t] % LANES])

    return group_embed_kernel
