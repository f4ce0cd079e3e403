"""Group-quantized linear layers and embeddings against NumPy's dequantized product."""

import numpy as np
import pytest
from int8_cases import runnable_devices

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import group_linear, linear
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.group import dequantize_group, quantize_group
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

ROWS = [1, 5, 37]
# 3, 4 and 8 bits; both layouts; every dtype of scales.
SCHEMES = ["q3f16_0", "q3f16_1", "q4f16_0", "q4f16_1", "q4bf16_0", "q4bf16_1", "q4f32_1", "q8f16_1"]
# (out, in): whole blocks and groups, and neither.
SHAPES = [(64, 160), (37, 75)]


class Quantized:
    """A random weight in portable and in packed form, and what it stands for."""

    def __init__(self, rng, build, scheme_name, out_features, in_features, is_linear=True):
        scheme = get_scheme(scheme_name)
        self.form = group_format(scheme, is_linear)
        weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
        transposed = self.form.is_transposed
        words, scales = quantize_group(weight, scheme, transpose=transposed)
        self.value = dequantize_group(words, scales, scheme, in_features, transposed=transposed)
        word_shape = self.form.word_shape(out_features, in_features)
        scale_shape = self.form.scale_shape(out_features, in_features)
        self.packed = [
            interleave(build, words, word_shape, transposed),
            interleave(build, scales, scale_shape, transposed),
        ]


def interleave(build, array, shape, transposed):
    rows, columns = array.shape[::-1] if transposed else array.shape
    kernel = build(linear.interleave(rows, columns, array.dtype.name, transposed))
    return kernel(array, shape=shape, dtype=array.dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_matmul(build, rng, scheme, out_features, in_features):
    weight = Quantized(rng, build, scheme, out_features, in_features)
    kernel = build(group_linear.matmul(out_features, in_features, weight.form, None))
    for n in ROWS:
        x = rng.standard_normal((n, in_features)).astype(np.float32)
        found = kernel(x, *weight.packed, shape=(n, out_features))
        expected = x.astype(np.float64) @ weight.value.astype(np.float64).T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("bias_dtype", ["float32", "float16", "bfloat16"])
def test_bias(build, rng, bias_dtype):
    weight = Quantized(rng, build, "q4f16_1", 37, 36)
    kernel = build(group_linear.matmul(37, 36, weight.form, bias_dtype))
    bias = rng.standard_normal(37).astype(numpy_dtype(bias_dtype))
    for n in ROWS:
        x = rng.standard_normal((n, 36)).astype(np.float32)
        found = kernel(x, *weight.packed, bias, shape=(n, 37))
        expected = x.astype(np.float64) @ weight.value.astype(np.float64).T + bias.astype(float)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("device", runnable_devices())
@pytest.mark.parametrize("rows", [linear.ROWS, linear.FEW_ROWS])
def test_a_row_does_not_depend_on_its_batch(build, build_for, rng, rows, device):
    weight = Quantized(rng, build, "q3f16_1", 37, 75)
    kernel = build_for(device)(group_linear.matmul(37, 75, weight.form, None, rows))
    x = rng.standard_normal((11, 75)).astype(np.float32)
    together = kernel(x, *weight.packed, shape=(11, 37))
    for n in range(1, 9):
        found = kernel(x[3 : 3 + n], *weight.packed, shape=(n, 37))
        np.testing.assert_array_equal(found, together[3 : 3 + n])


def test_both_layouts_pack_to_the_same(build, rng):
    values = [Quantized(np.random.default_rng(1), build, name, 37, 75) for name in SCHEMES[2:4]]
    assert values[0].form.is_transposed and not values[1].form.is_transposed
    for first, second in zip(values[0].packed, values[1].packed, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scheme", ["q3f16_1", "q4f16_0", "q4bf16_1", "q8f16_1"])
def test_embed(build, rng, scheme):
    table = Quantized(rng, build, scheme, 131, 75, is_linear=False)
    kernel = build(group_linear.embed(131, 75, table.form))
    for ids in ([130], [0, 3, 3, 16, 1]):
        index = np.asarray(ids, np.int32)
        found = kernel(index, *table.packed, shape=(len(ids), 75))
        np.testing.assert_array_equal(found, table.value[index])
