"""Vector expressions against NumPy."""

import numpy as np
import pytest
from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    MASKED,
    exp,
    exp2,
    lane_dtype,
    reduce_max,
    reduce_sum,
    span,
    splat,
    vector_lanes,
)


def exp_kernel(lanes):
    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        n = T.int32()
        x = T.match_buffer(x_handle, (n,), "float32")
        out = T.match_buffer(out_handle, (n,), "float32")
        for i in T.serial(n // lanes):
            out[span(i * lanes, lanes)] = exp(x[span(i * lanes, lanes)], lanes)

    return kernel


def exp2_kernel(lanes):
    @T.prim_func(private=True, s_tir=True)
    def kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        n = T.int32()
        x = T.match_buffer(x_handle, (n,), "float32")
        out = T.match_buffer(out_handle, (n,), "float32")
        for i in T.serial(n // lanes):
            out[span(i * lanes, lanes)] = exp2(x[span(i * lanes, lanes)], lanes)

    return kernel


def reduce_kernel(lanes):
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((lanes,), "float32"), out: T.Buffer((2,), "float32")) -> None:
        out[0] = reduce_sum(x[span(0, lanes)], lanes)
        out[1] = reduce_max(x[span(0, lanes)], lanes)

    return kernel


@pytest.mark.cpu
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_exp(build, lanes):
    kernel = build(exp_kernel(lanes))
    x = np.linspace(-87, 88, 16_000, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    found = kernel(x, shape=x.shape)
    assert np.abs(found / expected - 1).max() < 3e-7
    small = np.asarray([-88, -100, -1e4, MASKED] * 4, np.float32)
    assert not kernel(small, shape=small.shape).any()
    large = np.full(16, 1e4, np.float32)
    assert np.isfinite(kernel(large, shape=large.shape)).all()
    assert kernel(np.zeros(16, np.float32), shape=(16,)).tolist() == [1.0] * 16


@pytest.mark.cpu
@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_exp2(build, lanes):
    kernel = build(exp2_kernel(lanes))
    x = np.linspace(-126, 126, 16_000, dtype=np.float32)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(kernel(x, shape=x.shape) / expected - 1).max() < 2e-7
    whole = np.arange(-126, 114, dtype=np.float32)
    np.testing.assert_array_equal(kernel(whole, shape=whole.shape), np.exp2(whole))
    small = np.asarray([-127, -130, -1e4, MASKED] * 4, np.float32)
    assert not kernel(small, shape=small.shape).any()


@pytest.mark.cpu
@pytest.mark.parametrize("lanes", [1, 2, 16])
def test_reductions(build, rng, lanes):
    kernel = build(reduce_kernel(lanes))
    x = -np.abs(rng.standard_normal(lanes)).astype(np.float32)
    found = kernel(x, shape=(2,))
    np.testing.assert_allclose(found, [x.sum(dtype=np.float64), x.max()], rtol=1e-6)


@pytest.mark.parametrize(
    ("extent", "lanes"), [(64, 16), (48, 16), (24, 8), (36, 4), (10, 2), (75, 1), (1, 1)]
)
def test_vector_lanes_divide_the_extent(extent, lanes):
    assert vector_lanes(extent) == lanes


def test_one_lane_is_a_scalar():
    assert (splat(2.5, 1), span(7, 1), lane_dtype("float32", 1)) == (2.5, 7, "float32")
    assert lane_dtype("int32", 4) == "int32x4"
