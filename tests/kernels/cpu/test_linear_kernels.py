"""Unquantized linear layers and embeddings against NumPy."""

import numpy as np
import pytest
from int8_cases import runnable_devices

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import linear

pytestmark = pytest.mark.cpu

ROWS = [1, 5, 37]


def make_weight(rng, out_features, in_features, dtype):
    return rng.standard_normal((out_features, in_features)).astype(numpy_dtype(dtype))


def pack(weight):
    """Interleave 16 rows, rows past the end zero."""
    out_features, in_features = weight.shape
    rows = np.zeros((linear.num_blocks(out_features) * 16, in_features), weight.dtype)
    rows[:out_features] = weight
    return np.ascontiguousarray(rows.reshape(-1, 16, in_features).swapaxes(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("out_features", "in_features"), [(37, 20), (16, 75)])
def test_pack(build, rng, out_features, in_features, dtype):
    weight = make_weight(rng, out_features, in_features, dtype)
    kernel = build(linear.interleave(out_features, in_features, dtype, False))
    shape = linear.packed_shape(out_features, in_features)
    packed = kernel(weight, shape=shape, dtype=numpy_dtype(dtype))
    np.testing.assert_array_equal(packed, pack(weight))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("out_features", "in_features", "has_bias"),
    [(64, 64, False), (37, 75, True), (3, 1, False), (131, 36, True)],
)
def test_matmul(build, rng, out_features, in_features, has_bias, dtype):
    kernel = build(linear.matmul(out_features, in_features, dtype, has_bias))
    weight = make_weight(rng, out_features, in_features, dtype)
    bias = make_weight(rng, 1, out_features, dtype)[0]
    for n in ROWS:
        x = rng.standard_normal((n, in_features)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        inputs = [x, pack(weight)]
        if has_bias:
            inputs.append(bias)
            expected = expected + bias.astype(np.float64)
        found = kernel(*inputs, shape=(n, out_features))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("device", runnable_devices())
@pytest.mark.parametrize("rows", [linear.ROWS, linear.FEW_ROWS])
def test_a_row_does_not_depend_on_its_batch(build_for, rng, rows, device):
    kernel = build_for(device)(linear.matmul(37, 75, "float16", True, rows))
    weights = [pack(make_weight(rng, 37, 75, "float16")), make_weight(rng, 1, 37, "float16")[0]]
    x = rng.standard_normal((11, 75)).astype(np.float32)
    together = kernel(x, *weights, shape=(11, 37))
    for n in range(1, 9):
        found = kernel(x[3 : 3 + n], *weights, shape=(n, 37))
        np.testing.assert_array_equal(found, together[3 : 3 + n])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("num_embeddings", "features"), [(131, 36), (16, 75)])
def test_embed(build, rng, num_embeddings, features, dtype):
    kernel = build(linear.embed(num_embeddings, features, dtype))
    table = make_weight(rng, num_embeddings, features, dtype)
    for ids in ([num_embeddings - 1], [0, 3, 3, 15, 1]):
        index = np.asarray(ids, np.int32)
        found = kernel(index, pack(table), shape=(len(ids), features))
        np.testing.assert_array_equal(found, table[index].astype(np.float32))
