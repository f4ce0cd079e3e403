"""The arithmetic of quantized checkpoints: packed integers and small floats to float32 weights.

Knows arrays of each layout. Does not know names, configurations or files.
Weights come out as (out_features, in_features), exact but for the product of code and scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile

Integers = NDArray[np.int32]
Floats = NDArray[np.float32]

# Values decoded at a time, so that only the result has full size.
_BLOCK_VALUES = 1 << 20
# Column i of eight lies in this nibble: AutoAWQ packs 0, 2, 4, 6, 1, 3, 5, 7.
_AWQ_NIBBLES = np.array([(i % 2) * 4 + i // 2 for i in range(8)], np.uint32)
# E2M1: a sign, two bits of exponent, one of fraction (OCP Microscaling Formats 1.0, 5.3.3).
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FLOAT4_VALUES = np.concatenate([_FLOAT4, -_FLOAT4])


def unpack_bits(words: Integers, bits: int) -> Integers:
    """Return the codes along the last axis of 32-bit words, lowest bits first.

    Codes follow each other without gaps: 3-bit codes may lie across two words.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    count = words.shape[-1] * 32 // bits
    positions = np.arange(count) * bits
    first, shift = positions // 32, (positions % 32).astype(np.uint32)
    codes = words[..., first] >> shift
    across = np.flatnonzero(shift + bits > 32)
    codes[..., across] |= words[..., first[across] + 1] << (32 - shift[across])
    return (codes & np.uint32((1 << bits) - 1)).astype(np.int32)


def _unpack_awq(words: Integers) -> Integers:
    """Return 4-bit codes along the last axis in AutoAWQ's order."""
    words = np.ascontiguousarray(words).view(np.uint32)
    codes = (words[..., None] >> (_AWQ_NIBBLES * 4)) & np.uint32(15)
    return codes.reshape(*words.shape[:-1], -1).astype(np.int32)


def _blocks(rows: int, row_values: int, multiple: int = 1) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // max(1, row_values) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def decode_awq(qweight: Integers, qzeros: Integers, scales: NDArray[np.float16]) -> Floats:
    """Decode AutoAWQ's GEMM layout: w = (q - zero) * scale.

    qweight: (in, out / 8); qzeros: (groups, out / 8); scales: (groups, out). Returns (out, in).
    """
    rows, columns = qweight.shape[0], scales.shape[1]
    group_size = rows // scales.shape[0]
    zeros, steps = _unpack_awq(qzeros), scales.astype(np.float32)
    weight = np.empty((columns, rows), np.float32)
    for block in _blocks(rows, columns):
        group = np.arange(block.start, block.stop) // group_size
        values = (_unpack_awq(qweight[block]) - zeros[group]) * steps[group]
        weight[:, block] = values.T
    return weight


def decode_gptq(
    qweight: Integers,
    qzeros: Integers,
    scales: NDArray[np.float16],
    group_of_row: Integers,
    bits: int,
    zero_offset: int,
) -> Floats:
    """Decode GPTQ's layout: w = (q - zero) * scale, with the group of each input given.

    qweight: (in * bits / 32, out), packed along its first axis; qzeros: (groups, out * bits / 32);
    scales: (groups, out); group_of_row: (in,). zero_offset: what is added to a stored zero, 1 in
    the first version of the format, whose zeros wrap around. Returns (out, in). Raises CorruptFile.
    """
    rows, columns = len(group_of_row), scales.shape[1]
    if len(group_of_row) and not 0 <= group_of_row.min() <= group_of_row.max() < len(scales):
        raise CorruptFile(f"g_idx names groups that are not among the {len(scales)} there are")
    zeros = (unpack_bits(qzeros, bits) + zero_offset) & ((1 << bits) - 1)
    steps = scales.astype(np.float32)
    weight = np.empty((columns, rows), np.float32)
    for block in _blocks(rows, columns, multiple=32):
        words = qweight[block.start * bits // 32 : block.stop * bits // 32]
        codes = unpack_bits(words.T, bits)  # (columns, rows of the block)
        group = group_of_row[block]
        weight[:, block] = (codes - zeros[group].T) * steps[group].T
    return weight


def decode_packed_rows(
    packed: Integers, scale: Floats, zero: Integers | None, group: Integers, bits: int
) -> Floats:
    """Decode rows of unsigned codes, as compressed-tensors packs them: w = (q - zero) * scale.

    packed: (out, ceil(in * bits / 32)); scale: (out, groups); zero: (out, groups), unsigned too,
    the middle code where None; group: (in,), the group of each input. Returns (out, in).
    Raises CorruptFile.
    """
    if len(group) and not 0 <= group.min() <= group.max() < scale.shape[1]:
        raise CorruptFile(f"weight_g_idx names groups that are not among {scale.shape[1]}")
    weight = np.empty((len(packed), len(group)), np.float32)
    for block in _blocks(*weight.shape):
        codes = unpack_bits(packed[block], bits)[:, : len(group)]
        middle = np.int32(1 << (bits - 1)) if zero is None else zero[block][:, group]
        weight[block] = (codes - middle) * scale[block][:, group]
    return weight


def decode_scaled(
    weight: NDArray[np.generic], scale: Floats, block_size: tuple[int, int] | None
) -> Floats:
    """Multiply small floats or integers with their scales.

    weight: (..., out, in). scale: one value, one a matrix (..., 1, 1), one a row (..., out, 1), or
    with block_size one for each block of rows and columns. Returns float32 of weight's shape.
    """
    values: Floats = weight.astype(np.float32)
    if block_size is None:
        values *= scale
        return values
    (block_rows, block_columns), columns = block_size, weight.shape[-1]
    for row in range(scale.shape[-2]):
        steps = np.repeat(scale[..., row, :], block_columns, axis=-1)[..., None, :columns]
        values[..., row * block_rows : (row + 1) * block_rows, :] *= steps
    return values


def decode_mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Floats:
    """Decode 4-bit floats with a power of two for 32 of them (OCP Microscaling Formats 1.0).

    blocks: (experts, out, groups, 16), the lower nibble first; scales: (experts, out, groups), the
    exponent plus 127. Returns (experts, groups * 32, out): gpt-oss multiplies from the left.
    """
    experts, rows, groups, half = blocks.shape
    weight = np.empty((experts, groups * half * 2, rows), np.float32)
    for expert in range(experts):
        codes = np.stack([blocks[expert] & 15, blocks[expert] >> 4], axis=-1)
        values = _FLOAT4_VALUES[codes].reshape(rows, groups, half * 2)
        exponents = scales[expert].astype(np.int32)[..., None] - 127
        weight[expert] = np.ldexp(values, exponents).reshape(rows, -1).T
    return weight
