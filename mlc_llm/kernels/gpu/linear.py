"""Products with weights and look-ups in tables, as computations without a schedule.

Weights are (out, in), plain or group-quantized in their portable form; quantized ones are taken
apart where they are read. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.gpu.rows import (
    RowCount,
    computation,
    compute,
    constant,
    narrow,
    num_rows,
    summed,
    tensor,
    wide,
)

Weight = Callable[[Any, Any], Any]


def matmul(
    n: RowCount, out_features: int, in_features: int, dtype: str, out_dtype: str, has_bias: bool
) -> Any:
    """Multiply: x (n, in), weight (out, in)[, bias (out)] of dtype -> (n, out) of out_dtype."""
    weight = tensor("weight", (out_features, in_features), dtype)
    return multiply(n, weight, [weight], dtype, out_dtype, has_bias)


def group_matmul(
    n: RowCount,
    out_features: int,
    in_features: int,
    form: GroupFormat,
    out_dtype: str,
    has_bias: bool,
) -> Any:
    """Multiply: x (n, in), words, scales[, bias (out)] -> (n, out) of out_dtype.

    x and bias are of the scales' dtype.
    """
    words, scales = _packed(out_features, in_features, form)
    weight = compute(
        (out_features, in_features), _dequantized(words, scales, form), name="dequantize"
    )
    return multiply(n, weight, [words, scales], form.scale_dtype, out_dtype, has_bias)


def embed(n: RowCount, num_embeddings: int, features: int, dtype: str) -> Any:
    """Look up: ids (n) int32, table (num_embeddings, features) -> (n, features)."""
    table = tensor("table", (num_embeddings, features), dtype)
    return _embed(n, features, lambda row, c: table[row, c], [table])


def group_embed(n: RowCount, num_embeddings: int, features: int, form: GroupFormat) -> Any:
    """Look up: ids (n) int32, words, scales -> (n, features) of the scales' dtype."""
    words, scales = _packed(num_embeddings, features, form)
    return _embed(n, features, _dequantized(words, scales, form), [words, scales])


def multiply(
    n: RowCount, weight: Any, stored: list[Any], dtype: str, out_dtype: str, has_bias: bool
) -> Any:
    """Return the kernel of x (n, in), `stored`[, bias (out)] -> (n, out) of out_dtype.

    weight (out, in) is computed of the tensors `stored`, or one of them; x and bias are of dtype.
    """
    rows = num_rows(n)
    out_features, in_features = (int(extent) for extent in weight.shape)
    x = tensor("x", (rows, in_features), dtype)
    k = summed(in_features)
    bias = [tensor("bias", (out_features,), dtype)] if has_bias else []
    is_result = not bias and out_dtype == "float32"
    total = compute(
        (rows, out_features),
        lambda i, o: te.sum(wide(x[i, k]) * wide(weight[o, k]), k),
        name="out" if is_result else "total",
    )

    def item(i: Any, o: Any) -> Any:
        value = total[i, o] + wide(bias[0][o]) if bias else total[i, o]
        return narrow(value, out_dtype)

    out = total
    if not is_result:
        out = compute((rows, out_features), item, name="out")
    return computation([x, *stored, *bias, out])


def _embed(n: RowCount, features: int, weight: Weight, stored: list[Any]) -> Any:
    rows = num_rows(n)
    ids = tensor("ids", (rows,), "int32")
    out = compute((rows, features), lambda i, c: weight(ids[i], c), name="out")
    return computation([ids, *stored, out])


def _packed(out_features: int, in_features: int, form: GroupFormat) -> tuple[Any, Any]:
    """Return placeholders of words and scales, (out, ...), or (..., out) where transposed."""
    groups = form.num_groups(in_features)
    shapes = [
        (out_features, groups * form.words_per_group),
        (out_features, groups * form.scales_per_group),
    ]
    if form.is_transposed:
        shapes = [shape[::-1] for shape in shapes]
    return tensor("words", shapes[0], "uint32"), tensor("scales", shapes[1], form.scale_dtype)


def _dequantized(words: Any, scales: Any, form: GroupFormat) -> Weight:
    """Return what weight (o, k) is; codes fill words from the low end."""
    per_word, per_group = form.values_per_word, form.group_size

    def at(tensor: Any, row: Any, column: Any) -> Any:
        return tensor[column, row] if form.is_transposed else tensor[row, column]

    def field(word: Any, shift: Any, bits: int) -> Any:
        return (word >> tirx.Cast("uint32", shift)) & tirx.const((1 << bits) - 1, "uint32")

    def code(o: Any, k: Any) -> Any:
        if not form.high_bits:
            return field(at(words, o, k // per_word), k % per_word * form.bits, form.bits)
        first, place = k // per_group * form.words_per_group, k % per_group
        low = at(words, o, first + place // per_word)
        word, shift = form.high_bits_at(place)
        high = at(words, o, first + form.low_words + word)
        return field(low, place % per_word * form.low_bits, form.low_bits) | (
            field(high, shift, form.high_bits) << tirx.const(form.low_bits, "uint32")
        )

    def weight(o: Any, k: Any) -> Any:
        value, group = tirx.Cast("float32", code(o, k)), k // per_group
        if form.has_minimum:
            scale, minimum = (wide(at(scales, o, group * 2 + i)) for i in range(2))
            return narrow(value * scale + minimum, form.scale_dtype)
        scale = wide(at(scales, o, group))
        return narrow((value - constant(form.zero_point)) * scale, form.scale_dtype)

    return weight
