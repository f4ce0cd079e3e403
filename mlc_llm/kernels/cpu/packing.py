"""Packing of weights whose portable layout is not that of groups: AutoAWQ's, and 8-bit floats.

All of them become words and scales of a `GroupFormat`, so that one kernel multiplies them.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.linear import num_blocks
from mlc_llm.kernels.cpu.vector_math import LANES

AWQ_FORM = GroupFormat(4, 128, "float32", False, has_minimum=True)


def float8_form(dtype: Any, in_features: int, group_size: int | None) -> GroupFormat:
    """Return the format that 8-bit floats pack to.

    group_size: inputs that share a scale, None where all do: then as few copies of it are kept as
    need no padding.
    """
    sizes = (512, 256, 128, 64, 32)
    size = group_size or next((size for size in sizes if in_features % size == 0), 32)
    return GroupFormat(8, size, "float32", False, float_code=dtype)


def _awq_code(words: Any, row: Any, column: Any) -> Any:
    """Return a 4-bit code of (rows, columns / 8) words: column i is at nibble i % 2 * 4 + i / 2."""
    place = column % 8
    shift = (place % 2 * 4 + place // 2) * 4
    shifted = T.shift_right(words[row, column // 8], T.Cast("uint32", shift))
    return T.bitwise_and(shifted, T.uint32(15))


def awq_words(out_features: int, in_features: int) -> Any:
    """Pack qweight (in, out / 8) -> words (ceil(out / 16), in / 8, 16)."""
    blocks, words = num_blocks(out_features), in_features // 8

    @T.prim_func(private=True, s_tir=True)
    def awq_words_kernel(
        source: T.Buffer((in_features, out_features // 8), "uint32"),
        packed: T.Buffer((blocks, words, LANES), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            for w in T.serial(words):
                for v in T.serial(LANES):
                    packed[b, w, v] = T.uint32(0)
                    if b * LANES + v < out_features:
                        for i in T.serial(8):
                            packed[b, w, v] = T.bitwise_or(
                                packed[b, w, v],
                                T.shift_left(
                                    _awq_code(source, w * 8 + i, b * LANES + v),
                                    T.Cast("uint32", i * 4),
                                ),
                            )

    return awq_words_kernel


def awq_scales(out_features: int, groups: int) -> Any:
    """Pack qzeros (groups, out / 8) and scales (groups, out) float16 -> scale and minimum of each
    group, float32: (ceil(out / 16), 2 * groups, 16). A minimum is -zero * scale, exactly.
    """
    blocks = num_blocks(out_features)

    @T.prim_func(private=True, s_tir=True)
    def awq_scales_kernel(
        zeros: T.Buffer((groups, out_features // 8), "uint32"),
        scales: T.Buffer((groups, out_features), "float16"),
        packed: T.Buffer((blocks, 2 * groups, LANES), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            for g in T.serial(groups):
                for v in T.serial(LANES):
                    if b * LANES + v < out_features:
                        packed[b, 2 * g, v] = T.Cast("float32", scales[g, b * LANES + v])
                        packed[b, 2 * g + 1, v] = packed[b, 2 * g, v] * T.Cast(
                            "float32", -T.Cast("int32", _awq_code(zeros, g, b * LANES + v))
                        )
                    else:
                        packed[b, 2 * g, v] = T.float32(0)
                        packed[b, 2 * g + 1, v] = T.float32(0)

    return awq_scales_kernel


def float8_words(out_features: int, in_features: int, form: GroupFormat) -> Any:
    """Pack a weight (out, in) of 8-bit floats -> words (ceil(out / 16), words, 16), 4 inputs each.

    What lies past the end is zero.
    """
    blocks, dtype = num_blocks(out_features), str(form.float_code)
    words = form.num_groups(in_features) * form.words_per_group

    @T.prim_func(private=True, s_tir=True)
    def float8_words_kernel(
        source: T.Buffer((out_features, in_features), dtype),
        packed: T.Buffer((blocks, words, LANES), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            for w in T.serial(words):
                for v in T.serial(LANES):
                    packed[b, w, v] = T.uint32(0)
                    for i in T.serial(4):
                        if b * LANES + v < out_features and w * 4 + i < in_features:
                            packed[b, w, v] = T.bitwise_or(
                                packed[b, w, v],
                                T.shift_left(
                                    T.Cast(
                                        "uint32",
                                        T.reinterpret("uint8", source[b * LANES + v, w * 4 + i]),
                                    ),
                                    T.Cast("uint32", i * 8),
                                ),
                            )

    return float8_words_kernel


def float8_scales(
    out_features: int, in_features: int, form: GroupFormat, shape: tuple[int, ...]
) -> Any:
    """Repeat float32 scales of blocks -> one for each row and group: (ceil(out / 16), groups, 16).

    shape: (1,) where one scale is for all, else (ceil(out / rows), groups) where a block has as
    many rows as a group has inputs.
    """
    blocks, groups, rows = num_blocks(out_features), form.num_groups(in_features), form.group_size

    if shape == (1,):

        @T.prim_func(private=True, s_tir=True)
        def float8_scale_kernel(
            scale: T.Buffer((1,), "float32"),
            packed: T.Buffer((blocks, groups, LANES), "float32"),
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            for b in T.parallel(blocks):
                for g in T.serial(groups):
                    for v in T.serial(LANES):
                        packed[b, g, v] = scale[0]

        return float8_scale_kernel

    @T.prim_func(private=True, s_tir=True)
    def float8_scales_kernel(
        scales: T.Buffer(shape, "float32"),
        packed: T.Buffer((blocks, groups, LANES), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            for g in T.serial(groups):
                for v in T.serial(LANES):
                    packed[b, g, v] = scales[T.min(b * LANES + v, out_features - 1) // rows, g]

    return float8_scales_kernel
