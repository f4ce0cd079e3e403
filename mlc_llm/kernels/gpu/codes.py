"""Products with weights in AutoAWQ's layout and of 8-bit floats, without a schedule.

Weights are taken apart where they are read, as in `linear.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from tvm import tirx

from mlc_llm.kernels.gpu.linear import multiply
from mlc_llm.kernels.gpu.rows import RowCount, compute, constant, narrow, tensor, wide

# Inputs that share a scale of AutoAWQ's; rows and columns that share one of 8-bit floats.
AWQ_GROUP, BLOCK_SIZE = 128, 128
# What of a float32 has the place of a code's exponent and fraction, how far its exponent is moved,
# and what the fraction is divided by where the exponent is 0.
_FLOAT8 = {"float8_e4m3fn": (20, 120, 2.0**9), "float8_e5m2": (21, 112, 2.0**16)}
_FRACTION_BITS = {"float8_e4m3fn": 3, "float8_e5m2": 2}


def awq_matmul(
    n: RowCount, out_features: int, in_features: int, out_dtype: str, has_bias: bool
) -> Any:
    """Multiply: x (n, in), qweight (in, out / 8), qzeros (in / 128, out / 8) uint32, scales
    (in / 128, out)[, bias (out)] -> (n, out) of out_dtype; x, scales and bias are float16.
    """
    groups, words = in_features // AWQ_GROUP, out_features // 8
    qweight = tensor("qweight", (in_features, words), "uint32")
    qzeros = tensor("qzeros", (groups, words), "uint32")
    scales = tensor("scales", (groups, out_features), "float16")

    def item(o: Any, k: Any) -> Any:
        group = k // AWQ_GROUP
        steps = _awq_code(qweight, k, o) - _awq_code(qzeros, group, o)
        return narrow(tirx.Cast("float32", steps) * wide(scales[group, o]), "float16")

    weight = compute((out_features, in_features), item, name="dequantize")
    return multiply(n, weight, [qweight, qzeros, scales], "float16", out_dtype, has_bias)


def float8_matmul(
    n: RowCount,
    out_features: int,
    in_features: int,
    code: Literal["float8_e4m3fn", "float8_e5m2"],
    scales: Literal["none", "tensor", "block"],
    dtype: str,
    has_bias: bool,
) -> Any:
    """Multiply: x (n, in), words (out, in / 4) uint32 of four 8-bit floats each[, scales float32][,
    bias (out)] -> (n, out); x, bias and the result are of dtype.

    scales: one for all, (1,), or one for each block of 128 x 128 weights.
    """
    words = tensor("words", (out_features, in_features // 4), "uint32")
    extents = (-(-out_features // BLOCK_SIZE), -(-in_features // BLOCK_SIZE))
    stored = [words]
    if scales != "none":
        stored.append(tensor("scales", (1,) if scales == "tensor" else extents, "float32"))

    def item(o: Any, k: Any) -> Any:
        shift = tirx.Cast("uint32", k % 4 * 8)
        byte = (words[o, k // 4] >> shift) & tirx.const(255, "uint32")
        value = float8_value(byte, code)
        if scales == "tensor":
            value = value * stored[1][0]
        elif scales == "block":
            value = value * stored[1][o // BLOCK_SIZE, k // BLOCK_SIZE]
        return narrow(value, dtype)

    weight = compute((out_features, in_features), item, name="dequantize")
    return multiply(n, weight, stored, dtype, dtype, has_bias)


def float8_value(byte: Any, code: str) -> Any:
    """Return the number, float32, of 8 bits in a uint32; NaN and infinity are large numbers."""
    shift, exponent, divisor = _FLOAT8[code]

    def bits(value: int) -> Any:
        return tirx.const(value, "uint32")

    size = byte & bits(0x7F)
    # GPUs may take float32 without a leading one for 0, so those of 8 bits are counted.
    counted = tirx.Cast("float32", tirx.Cast("int32", size)) / constant(divisor)
    moved = tirx.reinterpret("float32", (size << bits(shift)) + bits(exponent << 23))
    number = tirx.Select(size < bits(1 << _FRACTION_BITS[code]), counted, moved)
    return tirx.Select(byte < bits(0x80), number, -number)


def _awq_code(words: Any, row: Any, column: Any) -> Any:
    """Return a 4-bit code, int32: column i of a word is its nibble i % 2 * 4 + i / 2."""
    place = column % 8
    shift = tirx.Cast("uint32", (place % 2 * 4 + place // 2) * 4)
    code = (words[row, column // 8] >> shift) & tirx.const(15, "uint32")
    return tirx.Cast("int32", code)
