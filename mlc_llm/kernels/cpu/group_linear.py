"""Linear layers and embeddings on group-quantized weights, float path (float32 activations).

Packed layout: words (ceil(out / 16), words along in, 16) uint32 and scales (ceil(out / 16),
groups, 16): the portable words of 16 output rows interleaved. Both portable layouts (NK and KN)
pack to the same. Where groups have a minimum, it follows the scale: (ceil(out / 16), 2 * groups,
16). The sum over `in` runs in order, whatever the number of tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.linear import ROWS, num_blocks, store_tile
from mlc_llm.kernels.cpu.vector_math import LANES, multiply_add, splat

# What a number of e4m3 is multiplied by, after it was read as a float16.
_UNIT = 256


@dataclass(frozen=True)
class GroupFormat:
    """Numbers of a group quantization that its kernels need.

    A weight is (code - zero_point) * scale, or code * scale + minimum where groups have one.
    With a `float_code` codes are numbers of that 8-bit dtype, and a weight is code * scale.
    Codes of 3, 4 and 8 bits fill words from the low end. Those of 5 and 6 bits lie in two planes:
    a group's words of low 4 bits, then its words of high bits, see `high_bits_at`.
    """

    bits: int
    group_size: int
    scale_dtype: str
    is_transposed: bool  # portable arrays are (in, out): the KN layout
    code_of_zero: int | None = None  # where it is not the middle of the codes
    has_minimum: bool = False
    float_code: Literal["float8_e4m3fn", "float8_e5m2"] | None = None

    @property
    def low_bits(self) -> int:
        """Return the bits of a code that lie together in the low plane."""
        return 4 if self.bits in (5, 6) else self.bits

    @property
    def high_bits(self) -> int:
        """Return the bits of a code in the high plane: 1, 2, or 0 where there is none."""
        return self.bits - self.low_bits

    @property
    def values_per_word(self) -> int:
        """Return how many values one uint32 (of the low plane) holds."""
        return 32 // self.low_bits

    @property
    def low_words(self) -> int:
        """Return how many uint32 the low plane of one group takes."""
        return self.group_size // self.values_per_word

    @property
    def words_per_group(self) -> int:
        """Return how many uint32 one group takes."""
        return self.low_words + self.group_size * self.high_bits // 32

    @property
    def scales_per_group(self) -> int:
        """Return how many values stand beside the codes of a group: its scale and its minimum."""
        return 2 if self.has_minimum else 1

    @property
    def zero_point(self) -> int:
        """Return the code of zero; 0 where groups have a minimum."""
        if self.has_minimum:
            return 0
        return (1 << (self.bits - 1)) - 1 if self.code_of_zero is None else self.code_of_zero

    def high_bits_at(self, k: Any) -> tuple[Any, Any]:
        """Return where in a group its value k has its high bits: word of the plane, and shift.

        Values of a low word that are extracted together (every second one) form a quad; a byte
        of a high word holds the bits of one value of each of 8 / high_bits quads.
        """
        per_word = 8 // self.high_bits
        quad = k // 8 * 2 + k % 2
        return quad // per_word, k % 8 // 2 * 8 + quad % per_word * self.high_bits

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
        columns = self.num_groups(in_features) * self.scales_per_group
        return (num_blocks(out_features), columns, LANES)


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


def _field(word: Any, shift: Any, bits: int) -> Any:
    """Return the bits at `shift` of 16 words."""
    return T.bitwise_and(
        T.shift_right(word, T.broadcast(T.uint32(shift), LANES)),
        T.broadcast(T.uint32((1 << bits) - 1), LANES),
    )


def _code(form: GroupFormat, words: Any, b: Any, g: Any, w: Any, r: Any) -> Any:
    """Return the codes at place r of low word w of group g, in 16 rows."""
    first, lanes = g * form.words_per_group, T.ramp(0, 1, LANES)
    low = _field(words[b, first + w, lanes], r * form.low_bits, form.low_bits)
    if not form.high_bits:
        return low
    word, shift = form.high_bits_at(w * form.values_per_word + r)
    high = _field(words[b, first + form.low_words + word, lanes], shift, form.high_bits)
    return T.bitwise_or(low, T.shift_left(high, T.broadcast(T.uint32(form.low_bits), LANES)))


def _dequantize(form: GroupFormat, code: Any, scale: Any, offset: Any) -> Any:
    """Return 16 weights: code * scale + offset, or number * scale."""
    if form.float_code is not None:
        return _float8_as_half(code, form.float_code) * scale
    return multiply_add(T.Cast(f"float32x{LANES}", T.Cast(f"int32x{LANES}", code)), scale, offset)


def _float8_as_half(code: Any, dtype: str) -> Any:
    """Return 16 numbers of 8 bits as float32; those of e4m3 divided by 256, see `_UNIT`.

    float16 has the exponent of e5m2, and one bit more than that of e4m3, biased by 8 more.
    """

    def lanes(value: int) -> Any:
        return T.broadcast(T.uint32(value), LANES)

    if dtype == "float8_e5m2":
        half = T.shift_left(code, lanes(8))
    else:
        sign = T.shift_left(T.bitwise_and(code, lanes(0x80)), lanes(8))
        half = T.bitwise_or(sign, T.shift_left(T.bitwise_and(code, lanes(0x7F)), lanes(7)))
    number = T.reinterpret(f"float16x{LANES}", T.Cast(f"uint16x{LANES}", half))
    return T.Cast(f"float32x{LANES}", number)


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
    group_size, per_word, low_words = form.group_size, form.values_per_word, form.low_words
    zero_point, per_group, has_minimum = form.zero_point, form.scales_per_group, form.has_minimum
    unit = _UNIT if form.float_code == "float8_e4m3fn" else 1
    has_bias = bias_dtype is not None
    store_dtype = bias_dtype or "float32"

    @T.macro
    def load_scale(scales: T.handle, scale: T.handle, b: T.int32, g: T.int32) -> None:
        scale[0, T.ramp(0, 1, LANES)] = T.Cast(
            vector, scales[b, g * per_group, T.ramp(0, 1, LANES)]
        )
        if has_minimum:
            scale[1, T.ramp(0, 1, LANES)] = T.Cast(
                vector, scales[b, g * per_group + 1, T.ramp(0, 1, LANES)]
            )
        else:
            scale[1, T.ramp(0, 1, LANES)] = scale[0, T.ramp(0, 1, LANES)] * splat(
                T.float32(-zero_point)
            )
        if unit != 1:
            scale[0, T.ramp(0, 1, LANES)] = scale[0, T.ramp(0, 1, LANES)] * splat(T.float32(unit))

    @T.macro
    def gemv_block(
        x: T.handle, words: T.handle, scales: T.handle, bias: T.handle, out: T.handle, b: T.int32
    ) -> None:
        acc = T.alloc_buffer((1, LANES), "float32")
        scale = T.alloc_buffer((2, LANES), "float32")
        acc[0, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for g in T.serial(groups):
            load_scale(scales, scale, b, g)
            for w in T.serial(low_words):
                for r in T.unroll(per_word):
                    if g * group_size + w * per_word + r < in_features:
                        acc[0, T.ramp(0, 1, LANES)] = multiply_add(
                            splat(x[0, g * group_size + w * per_word + r]),
                            _dequantize(
                                form,
                                _code(form, words, b, g, w, r),
                                scale[0, T.ramp(0, 1, LANES)],
                                scale[1, T.ramp(0, 1, LANES)],
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
            for w in T.serial(low_words):
                for r in T.unroll(per_word):
                    weight[g * group_size + w * per_word + r, T.ramp(0, 1, LANES)] = _dequantize(
                        form,
                        _code(form, words, b, g, w, r),
                        scale[0, T.ramp(0, 1, LANES)],
                        scale[1, T.ramp(0, 1, LANES)],
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
