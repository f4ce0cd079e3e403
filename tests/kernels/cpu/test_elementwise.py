"""Row-wise kernels against NumPy, with widths that no vector divides."""

import ml_dtypes
import numpy as np
import pytest

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import activation, elementwise

pytestmark = pytest.mark.cpu

# 75: one lane; 36: four; 64: all sixteen. 1 and 5 rows: serial and parallel.
WIDTHS = [36, 64, 75]
ROWS = [1, 5, 37]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rms_norm(build, rng, width, dtype):
    kernel = build(elementwise.rms_norm(width, dtype, 1e-5))
    weight = rng.standard_normal(width).astype(numpy_dtype(dtype))
    for n in ROWS:
        x = (3 * rng.standard_normal((n, width))).astype(np.float32)
        mean = (x.astype(np.float64) ** 2).mean(axis=1, keepdims=True)
        expected = x / np.sqrt(mean + 1e-5) * weight.astype(np.float64)
        np.testing.assert_allclose(kernel(x, weight, shape=x.shape), expected, rtol=2e-6, atol=1e-6)


def test_rms_norm_of_zeros_is_zero(build):
    kernel = build(elementwise.rms_norm(36, "float32", 1e-6))
    x = np.zeros((2, 36), np.float32)
    np.testing.assert_array_equal(kernel(x, np.ones(36, np.float32), shape=x.shape), x)


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(build, rng, width):
    kernel = build(elementwise.silu_mul(width))
    for n in ROWS:
        x = (5 * rng.standard_normal((n, 2 * width))).astype(np.float32)
        gate, up = x[:, :width].astype(np.float64), x[:, width:]
        expected = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(kernel(x, shape=(n, width)), expected, rtol=2e-6, atol=1e-6)


def test_silu_mul_of_extremes_is_finite(build):
    kernel = build(elementwise.silu_mul(4))
    gate = np.asarray([-1e30, -200, 200, 1e30], np.float32)
    found = kernel(np.concatenate([gate, np.ones(4, np.float32)])[None], shape=(1, 4))
    np.testing.assert_allclose(found[0], np.maximum(gate, 0), rtol=1e-6, atol=1e-6)


def test_bounded_swiglu(build, rng):
    kernel = build(activation.bounded_swiglu(37, 1.702, 2.0))
    x = 3 * rng.standard_normal((13, 74)).astype(np.float32)
    x[0, :3] = -1e30, -200, 1e30
    x[0, 37:40] = 1e30, -1e30, 0
    gate = np.minimum(x[:, :37].astype(np.float64), 2.0)
    active = gate / (1 + np.exp(np.minimum(-1.702 * gate, 700)))
    expected = active * (x[:, 37:].clip(-2.0, 2.0) + 1)
    for n in (1, 13):
        found = kernel(x[:n], shape=(n, 37))
        np.testing.assert_allclose(found, expected[:n], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_add(build, rng, width):
    kernel = build(elementwise.add(width))
    for n in ROWS:
        x, y = rng.standard_normal((2, n, width)).astype(np.float32)
        np.testing.assert_array_equal(kernel(x, y, shape=x.shape), x + y)


@pytest.mark.parametrize("width", WIDTHS)
def test_take_rows(build, rng, width):
    kernel = build(elementwise.take_rows(width))
    x = rng.standard_normal((9, width)).astype(np.float32)
    for rows in ([8], [0, 0, 3], list(range(9))):
        index = np.asarray(rows, np.int32)
        np.testing.assert_array_equal(kernel(x, index, shape=(len(rows), width)), x[index])


def test_bfloat16_reaches_the_kernel_as_it_is(build):
    kernel = build(elementwise.rms_norm(16, "bfloat16", 0.0))
    weight = np.full(16, 1.5, ml_dtypes.bfloat16)
    found = kernel(np.ones((1, 16), np.float32), weight, shape=(1, 16))
    np.testing.assert_array_equal(found, np.full((1, 16), 1.5, np.float32))
