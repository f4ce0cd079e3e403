"""Group quantization in NumPy: pack weights into codes and scales, and unpack them.

Knows arrays and schemes. Does not know files, TVM or which layer a weight belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import TensorSpec, numpy_dtype
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.quantization.schemes import Scheme

# 2 Mi float32 values are 8 MiB; a worker holds about four such blocks at its peak.
_BLOCK_VALUES = 2 << 20
_MAX_WORKERS = 8

_Block = tuple[int, slice]


def packed_specs(
    name: str, shape: tuple[int, ...], scheme: Scheme, *, transpose: bool
) -> tuple[TensorSpec, TensorSpec]:
    """Return the specs of `name`.q_weight and `name`.q_scale for a weight (..., out, in)."""
    *leading, out_features, in_features = shape
    groups = scheme.num_groups(in_features)

    def spec(leaf: str, columns: int, dtype: str) -> TensorSpec:
        matrix = (columns, out_features) if transpose else (out_features, columns)
        return TensorSpec(f"{name}.{leaf}", (*leading, *matrix), dtype)

    return (
        spec("q_weight", groups * scheme.words_per_group, "uint32"),
        spec("q_scale", groups, scheme.dtype),
    )


def quantize_group(
    weight: NDArray[Any], scheme: Scheme, *, transpose: bool
) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """Pack a weight into groups of unsigned codes and one scale per group.

    weight: (..., out, in), any float dtype. Returns q_weight (..., out, words) uint32 and q_scale
    (..., out, groups) of the scheme's dtype; with `transpose` the last two dimensions swap.

    scale = max|group| / M, rounded to its storage dtype *before* it divides, so that codes are
    chosen for the scale that dequantizing uses; code = round_half_even(w / scale + M) in float32,
    clamped to 0..2M. The error per element is at most half a stored scale (while that scale is a
    normal number). A group whose scale is zero gets code M. Codes past `in` are 0.
    Needs about 40 MiB beside input and result for each of at most 8 threads.
    Raises CorruptFile on NaN or infinity, UnsupportedModel if a scale overflows its dtype.
    """
    *leading, out_features, in_features = weight.shape
    matrices = weight.reshape(-1, out_features, in_features)
    groups = scheme.num_groups(in_features)
    words = groups * scheme.words_per_group
    q_weight = _empty_rows(matrices, words, np.dtype(np.uint32), transpose)
    q_scale = _empty_rows(matrices, groups, numpy_dtype(scheme.dtype), transpose)

    def pack(block: _Block) -> None:
        codes, scale = _quantize_rows(matrices[block], scheme)
        q_scale[block] = scale
        q_weight[block] = _pack_words(codes, scheme)

    _for_each_block(pack, len(matrices), out_features, in_features)
    if transpose:
        q_weight, q_scale = q_weight.swapaxes(1, 2), q_scale.swapaxes(1, 2)
    return (
        q_weight.reshape(*leading, *q_weight.shape[1:]),
        q_scale.reshape(*leading, *q_scale.shape[1:]),
    )


def dequantize_group(
    q_weight: NDArray[np.uint32],
    q_scale: NDArray[Any],
    scheme: Scheme,
    in_features: int,
    *,
    transposed: bool,
) -> NDArray[np.float32]:
    """Unpack codes and scales into a weight (..., out, in_features) of float32.

    The arrays are as `quantize_group` returns them; `transposed` says that it was asked to swap.
    """
    if transposed:
        q_weight, q_scale = q_weight.swapaxes(-1, -2), q_scale.swapaxes(-1, -2)
    *leading, out_features, words = q_weight.shape
    words_of = q_weight.reshape(-1, out_features, words)
    scale_of = q_scale.reshape(-1, out_features, q_scale.shape[-1])
    weight = np.empty((len(words_of), out_features, in_features), np.float32)

    def unpack(block: _Block) -> None:
        codes = _unpack_words(words_of[block], scheme)  # (rows, words, values per word)
        values = codes.reshape(len(codes), -1, scheme.group_size).astype(np.float32)
        values -= scheme.max_int
        values *= scale_of[block].astype(np.float32)[..., None]
        weight[block] = values.reshape(len(values), -1)[:, :in_features]

    _for_each_block(unpack, len(words_of), out_features, in_features)
    return weight.reshape(*leading, out_features, in_features)


def _empty_rows(
    matrices: NDArray[Any], columns: int, dtype: np.dtype[Any], transpose: bool
) -> NDArray[Any]:
    """Allocate (matrices, out, columns), in memory as (matrices, columns, out) if `transpose`."""
    count, out_features, _ = matrices.shape
    if transpose:
        return np.empty((count, columns, out_features), dtype).swapaxes(1, 2)
    return np.empty((count, out_features, columns), dtype)


def _for_each_block(
    work: Callable[[_Block], None], matrices: int, rows: int, row_values: int
) -> None:
    """Call `work` on blocks of rows from a few threads (NumPy releases the GIL in its loops)."""
    step = max(1, _BLOCK_VALUES // max(1, row_values))

    def blocks() -> Iterator[_Block]:
        for matrix in range(matrices):
            for start in range(0, rows, step):
                yield matrix, slice(start, min(rows, start + step))

    todo = list(blocks())
    if len(todo) <= 1:
        for block in todo:
            work(block)
        return
    workers = min(_MAX_WORKERS, len(todo), os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="quantize") as pool:
        for _ in pool.map(work, todo):
            pass


def _quantize_rows(rows: NDArray[Any], scheme: Scheme) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """Return codes (rows, groups * group_size) and scales (rows, groups)."""
    count, in_features = rows.shape
    groups = scheme.num_groups(in_features)
    values = np.zeros((count, groups * scheme.group_size), np.float32)
    values[:, :in_features] = rows
    grouped = values.reshape(count, groups, scheme.group_size)
    scale = _group_scales(grouped, scheme)
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = 1.0  # such a group holds nothing that differs from zero
    grouped /= divisor[..., None]
    grouped += scheme.max_int
    np.rint(grouped, out=grouped)
    np.clip(grouped, 0, 2 * scheme.max_int, out=grouped)
    values[:, in_features:] = 0
    return values.astype(np.uint32), scale


def _group_scales(grouped: NDArray[np.float32], scheme: Scheme) -> NDArray[Any]:
    largest = np.maximum(grouped.max(axis=-1), -grouped.min(axis=-1))
    if not np.isfinite(largest).all():
        raise CorruptFile("the weight holds NaN or infinite values; fetch the checkpoint again")
    with np.errstate(over="ignore", under="ignore"):
        scale: NDArray[Any] = (largest / np.float32(scheme.max_int)).astype(
            numpy_dtype(scheme.dtype)
        )
    if not np.isfinite(scale.astype(np.float32)).all():
        raise UnsupportedModel(
            f"the weight reaches {largest.max():g}, too large for the {scheme.dtype} scales of "
            f"{scheme.name}; choose a quantization with bfloat16 or float32 scales"
        )
    return scale


def _pack_words(codes: NDArray[np.uint32], scheme: Scheme) -> NDArray[np.uint32]:
    per_word = codes.reshape(len(codes), -1, scheme.values_per_word)
    words = per_word[..., 0].copy()
    for position in range(1, scheme.values_per_word):
        words |= per_word[..., position] << np.uint32(position * scheme.bits)
    return words


def _unpack_words(words: NDArray[np.uint32], scheme: Scheme) -> NDArray[np.uint32]:
    shifts = np.arange(scheme.values_per_word, dtype=np.uint32) * np.uint32(scheme.bits)
    return (words[..., None] >> shifts) & np.uint32((1 << scheme.bits) - 1)
