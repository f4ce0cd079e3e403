"""Packing of AutoAWQ's layout and of 8-bit floats, and products with what they become."""

import numpy as np
import pytest
from packed_layouts import awq_pack, awq_unpack, float8_table

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import group_linear, packing

pytestmark = pytest.mark.cpu

ROWS = [1, 5]


def check_product(build, rng, packed, form, weight):
    rows, columns = weight.shape
    kernel = build(group_linear.matmul(rows, columns, form, None))
    for n in ROWS:
        x = rng.standard_normal((n, columns)).astype(np.float32)
        found = kernel(x, *packed, shape=(n, rows))
        magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T
        assert (np.abs(found - x.astype(np.float64) @ weight.T) <= 2e-6 * magnitude + 1e-30).all()


def test_awq(build, rng):
    rows, columns, form = 40, 256, packing.AWQ_FORM
    qweight = awq_pack(rng.integers(0, 16, (columns, rows)))
    qzeros = awq_pack(rng.integers(0, 16, (2, rows)))
    scales = rng.uniform(0.01, 0.1, (2, rows)).astype(np.float16)
    weight = awq_unpack(qweight, qzeros, scales)
    words = build(packing.awq_words(rows, columns))(
        qweight, shape=form.word_shape(rows, columns), dtype=np.uint32
    )
    packed_scales = build(packing.awq_scales(rows, 2))(
        qzeros, scales, shape=form.scale_shape(rows, columns)
    )
    check_product(build, rng, (words, packed_scales), form, weight)
    # The weights themselves, to the last bit.
    one = np.eye(columns, dtype=np.float32)
    kernel = build(group_linear.matmul(rows, columns, form, None))
    np.testing.assert_array_equal(kernel(one, words, packed_scales, shape=(256, 40)), weight.T)


@pytest.mark.parametrize(("dtype", "bits"), [("float8_e4m3fn", 4), ("float8_e5m2", 5)])
def test_every_float8(build, dtype, bits):
    table = float8_table(bits)
    codes = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    codes = np.resize(codes, (256, 1))
    form = packing.float8_form(dtype, 1, None)
    words = pack_float8(build, codes, dtype, form)
    scales = np.ones(form.scale_shape(256, 1), np.float32)
    kernel = build(group_linear.matmul(256, 1, form, None))
    found = kernel(np.ones((1, 1), np.float32), words, scales, shape=(1, 256))
    np.testing.assert_array_equal(found[0], table[codes[:, 0]])


def pack_float8(build, codes, dtype, form):
    rows, columns = codes.shape
    kernel = build(packing.float8_words(rows, columns, form))
    return kernel(
        codes.view(numpy_dtype(dtype)), shape=form.word_shape(rows, columns), dtype=np.uint32
    )


@pytest.mark.parametrize("columns", [512, 576, 75])
def test_one_scale_for_all(build, rng, columns):
    codes = rng.integers(0, 120, (37, columns), dtype=np.uint8)
    form = packing.float8_form("float8_e4m3fn", columns, None)
    words = pack_float8(build, codes, "float8_e4m3fn", form)
    scale = np.asarray([0.013], np.float32)
    kernel = build(packing.float8_scales(37, columns, form, (1,)))
    scales = kernel(scale, shape=form.scale_shape(37, columns))
    check_product(build, rng, (words, scales), form, float8_table(4)[codes] * float(scale[0]))


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (200, 300)])
def test_scales_of_blocks(build, rng, rows, columns):
    codes = rng.integers(0, 120, (rows, columns), dtype=np.uint8)
    form = packing.float8_form("float8_e4m3fn", columns, 128)
    words = pack_float8(build, codes, "float8_e4m3fn", form)
    stored = rng.uniform(0.5, 2, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
    kernel = build(packing.float8_scales(rows, columns, form, stored.shape))
    scales = kernel(stored, shape=form.scale_shape(rows, columns))
    each = np.repeat(np.repeat(stored, 128, axis=0), 128, axis=1)[:rows, :columns]
    weight = float8_table(4)[codes] * each.astype(np.float64)
    check_product(build, rng, (words, scales), form, weight)
