"""Macros of the float product with group-quantized weights that its kernels share.

They leave to their kernel which rows of activations (`TileRows`) meet which blocks. The sum over
`in` runs in order, so that every way of cutting the work gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.linear import store_rows
from mlc_llm.kernels.cpu.vector_math import LANES, multiply_add, splat

# What a number of e4m3 is multiplied by, after it was read as a float16.
_UNIT = 256


@dataclass(frozen=True)
class GroupMacros:
    """The macros of a shape.

    stream_row: one row on one block of 16 outputs. Its arguments: x, words, scales, result,
    `TileRows`, block of the weights, block of the outputs.
    unpack_block: words, scales, weights (`unpacked_inputs`, 16) float32, block: dequantize it.
    multiply_rows: x, these weights, result, `TileRows`, block of the outputs: a tile of rows.
    """

    stream_row: Any
    unpack_block: Any
    multiply_rows: Any
    unpacked_inputs: int


def group_macros(out_features: int, in_features: int, form: GroupFormat, rows: int) -> GroupMacros:
    """Return the macros of kernels for a shape; `rows` is how many make a tile."""
    groups, vector = form.num_groups(in_features), f"float32x{LANES}"
    group_size, per_word, low_words = form.group_size, form.values_per_word, form.low_words
    zero_point, per_group, has_minimum = form.zero_point, form.scales_per_group, form.has_minimum
    unit = _UNIT if form.float_code == "float8_e4m3fn" else 1

    @T.macro
    def load_scale(scales: T.handle, scale: T.handle, block: T.int32, g: T.int32) -> None:
        scale[0, T.ramp(0, 1, LANES)] = T.Cast(
            vector, scales[block, g * per_group, T.ramp(0, 1, LANES)]
        )
        if has_minimum:
            scale[1, T.ramp(0, 1, LANES)] = T.Cast(
                vector, scales[block, g * per_group + 1, T.ramp(0, 1, LANES)]
            )
        else:
            scale[1, T.ramp(0, 1, LANES)] = scale[0, T.ramp(0, 1, LANES)] * splat(
                T.float32(-zero_point)
            )
        if unit != 1:
            scale[0, T.ramp(0, 1, LANES)] = scale[0, T.ramp(0, 1, LANES)] * splat(T.float32(unit))

    @T.macro
    def stream_row(
        x: T.handle,
        words: T.handle,
        scales: T.handle,
        out: T.handle,
        at: T.meta_var,
        block: T.int32,
        b: T.int32,
    ) -> None:
        acc = T.alloc_buffer((1, LANES), "float32")
        scale = T.alloc_buffer((2, LANES), "float32")
        acc[0, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for g in T.serial(groups):
            load_scale(scales, scale, block, g)
            for w in T.serial(low_words):
                for r in T.unroll(per_word):
                    if g * group_size + w * per_word + r < in_features:
                        acc[0, T.ramp(0, 1, LANES)] = multiply_add(
                            splat(x[at.source(0), g * group_size + w * per_word + r]),
                            _dequantize(
                                form,
                                _code(form, words, block, g, w, r),
                                scale[0, T.ramp(0, 1, LANES)],
                                scale[1, T.ramp(0, 1, LANES)],
                            ),
                            acc[0, T.ramp(0, 1, LANES)],
                        )
        store_rows(out, acc, at, b, 1, out_features)

    @T.macro
    def unpack_block(words: T.handle, scales: T.handle, weight: T.handle, block: T.int32) -> None:
        scale = T.alloc_buffer((2, LANES), "float32")
        for g in T.serial(groups):
            load_scale(scales, scale, block, g)
            for w in T.serial(low_words):
                for r in T.unroll(per_word):
                    weight[g * group_size + w * per_word + r, T.ramp(0, 1, LANES)] = _dequantize(
                        form,
                        _code(form, words, block, g, w, r),
                        scale[0, T.ramp(0, 1, LANES)],
                        scale[1, T.ramp(0, 1, LANES)],
                    )

    @T.macro
    def multiply_rows(
        x: T.handle, weight: T.handle, out: T.handle, at: T.meta_var, b: T.int32
    ) -> None:
        acc = T.alloc_buffer((rows, LANES), "float32")
        for i in T.unroll(rows):
            acc[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for k in T.serial(in_features):
            for i in T.unroll(rows):
                acc[i, T.ramp(0, 1, LANES)] = multiply_add(
                    splat(x[at.source(i), k]),
                    weight[k, T.ramp(0, 1, LANES)],
                    acc[i, T.ramp(0, 1, LANES)],
                )
        store_rows(out, acc, at, b, rows, out_features)

    return GroupMacros(stream_row, unpack_block, multiply_rows, groups * group_size)


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
