"""Published layouts of quantized weights, written and read one value at a time.

AutoAWQ's integers, 8-bit floats as MLC LLM and Hugging Face store them, and the formats of single
layers. Shares no code with mlc_llm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Where AutoAWQ's word has the columns 0 to 7.
AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


def awq_pack(codes: Array) -> Array:
    """Return words (rows, columns / 8) uint32 of 4-bit codes (rows, columns)."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for row in range(rows):
        for column in range(columns):
            shift = 4 * AWQ_NIBBLES[column % 8]
            words[row, column // 8] |= np.uint32(int(codes[row, column]) << shift)
    return words


def awq_unpack(qweight: Array, qzeros: Array, scales: Array) -> Array:
    """Return the weight (out, in) in float64."""
    inputs, outputs, group = len(qweight), scales.shape[1], len(qweight) // len(scales)
    weight = np.zeros((outputs, inputs))
    for row in range(inputs):
        for column in range(outputs):
            shift = 4 * AWQ_NIBBLES[column % 8]
            code = int(qweight[row, column // 8]) >> shift & 15
            zero = int(qzeros[row // group, column // 8]) >> shift & 15
            weight[column, row] = (code - zero) * float(scales[row // group, column])
    return weight


def float8_table(exponent_bits: int) -> Array:
    """Return the numbers of all 256 codes by definition; 4 exponent bits are e4m3fn, 5 are e5m2."""
    fraction_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(256):
        exponent = code >> fraction_bits & (2**exponent_bits - 1)
        fraction = (code & (2**fraction_bits - 1)) / 2**fraction_bits
        number = 2.0 ** (1 - bias) * fraction
        if exponent:
            number = 2.0 ** (exponent - bias) * (1 + fraction)
        if exponent_bits == 5 and exponent == 31:
            number = np.nan if fraction else np.inf
        if exponent_bits == 4 and code & 127 == 127:
            number = np.nan
        values.append(-number if code & 128 else number)
    return np.asarray(values)


def round_to_float8(values: Array, exponent_bits: int) -> Array:
    """Return the codes (uint8) of the nearest numbers; of two equally near ones the even code."""
    table = float8_table(exponent_bits)
    numbers = np.where(np.isfinite(table[:128]), table[:128], np.nan)
    count = int(np.isfinite(numbers).sum())
    middle = (numbers[: count - 1] + numbers[1:count]) / 2
    magnitude = np.abs(values.astype(np.float64))
    below = np.searchsorted(middle, magnitude, side="left")
    above = np.searchsorted(middle, magnitude, side="right")
    code = np.where(below % 2 == 0, below, above).astype(np.uint8)
    return code | (np.signbit(values).astype(np.uint8) << 7)


def store_e5m2(name: str, weight: Array) -> Iterator[tuple[str, Array]]:
    """Yield a linear's weight without scale, everything else as it is."""
    if not _is_linear(name):
        yield name, weight
        return
    codes = round_to_float8(weight.astype(np.float32), 5)
    yield name.replace(".weight", ".q_weight"), codes.view(ml_dtypes.float8_e5m2)


def store_e4m3(name: str, weight: Array) -> Iterator[tuple[str, Array]]:
    """Yield a linear's weight with one scale, and that of activations nobody measured."""
    if not _is_linear(name):
        yield name, weight
        return
    values = weight.astype(np.float32)
    scale = np.maximum(np.abs(values).max() / np.float32(448), np.float32(1 / (448 * 512)))
    base = name.removesuffix(".weight")
    codes = round_to_float8(values / scale, 4)
    yield base + ".q_weight", codes.view(ml_dtypes.float8_e4m3fn)
    yield base + ".q_calibration_scale", np.ones(1, np.float32)
    yield base + ".q_scale", np.full(1, scale, np.float32)


def store_blocks(with_activations: bool) -> Callable[[str, Array], Iterator[tuple[str, Array]]]:
    """Return what yields a linear's weight with scales of 128 x 128 blocks."""

    def store(name: str, weight: Array) -> Iterator[tuple[str, Array]]:
        if not _is_linear(name):
            yield name, weight
            return
        values = weight.astype(np.float32)
        rows, columns = values.shape
        scales = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
        codes = np.zeros(values.shape, np.uint8)
        for i in range(len(scales)):
            for j in range(scales.shape[1]):
                block = values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                largest = np.abs(block).max() / np.float32(448)
                scales[i, j] = np.maximum(largest, np.float32(1 / (448 * 512)))
                rounded = round_to_float8(block / scales[i, j], 4)
                codes[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = rounded
        yield name, codes.view(ml_dtypes.float8_e4m3fn)
        yield name + "_scale_inv", scales
        if with_activations:
            yield name.removesuffix("weight") + "activation_scale", np.ones(1, np.float32)

    return store


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("c_attn.weight")


def read_float8(arrays: dict[str, Array], base: str) -> Array:
    """Return a linear's weight (out, in) in float64 from arrays under their stored names."""
    stored = arrays.get(base + ".q_weight", arrays.get(base + ".weight"))
    assert stored is not None
    table = float8_table(5 if stored.dtype == ml_dtypes.float8_e5m2 else 4)
    values = table[np.ascontiguousarray(stored).view(np.uint8)]
    if base + ".q_scale" in arrays:
        return values * float(arrays[base + ".q_scale"][0])
    if base + ".weight_scale_inv" in arrays:
        scales = arrays[base + ".weight_scale_inv"].astype(np.float64)
        scales = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)
        return values * scales[: len(values), : values.shape[1]]
    return values


def unpack_format(words: Array, scales: Array, name: str, columns: int) -> Array:
    """Return the weight (out, columns) in float64 of words and scales in a layer's format."""
    match = re.fullmatch(r"q(\d)_g(\d+)_(?:min|z(\d+))", name)
    assert match is not None
    bits, size = int(match[1]), int(match[2])
    low = 8 if bits == 8 else 4
    high = bits - low
    low_words = size * low // 32
    per_group = low_words + size * high // 32
    weight = np.zeros((len(words), columns))
    for row, row_words in enumerate(words.tolist()):
        for column in range(columns):
            group, k = divmod(column, size)
            in_group = row_words[group * per_group : (group + 1) * per_group]
            code = in_group[k * low // 32] >> k * low % 32 & (1 << low) - 1
            if high:
                # Quads are every second code of a low word; each has `high` bits of every byte.
                quad, byte = k // 8 * 2 + k % 2, k % 8 // 2
                word, place = divmod(quad, 8 // high)
                code |= (in_group[low_words + word] >> byte * 8 + place * high & high * 2 - 1) << 4
            if match[3] is None:
                weight[row, column] = code * float(scales[row, 2 * group])
                weight[row, column] += float(scales[row, 2 * group + 1])
            else:
                weight[row, column] = (code - int(match[3])) * float(scales[row, group])
    return weight
