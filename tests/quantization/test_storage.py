"""What weights become by AWQ and 8-bit floats, against layouts written out one value at a time."""

import ml_dtypes
import numpy as np
import pytest
from packed_layouts import (
    awq_pack,
    awq_unpack,
    float8_table,
    read_float8,
    round_to_float8,
    store_blocks,
    store_e4m3,
    store_e5m2,
)

from mlc_llm.errors import CorruptFile, OptionError, ParameterMismatch, UnsupportedModel
from mlc_llm.quantization.encoded import AwqArrays, Float8Blocks
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.quantization.storage import awq_storage, float8_storage

AWQ = get_scheme("q4f16_autoawq")
NAME = "x_proj"
FLOAT8 = {
    "e5m2_e5m2_f16": store_e5m2,
    "e4m3_e4m3_f16": store_e4m3,
    "e4m3_e4m3_f16_max_calibrate": store_e4m3,
    "fp8_e4m3fn_bf16_block_scale": store_blocks(False),
    "fp8_e4m3fn_bf16_block_scale_static_activation": store_blocks(True),
}
BLOCKS = get_scheme("fp8_e4m3fn_bf16_block_scale")


def random_awq(rng, outputs, inputs, group_size=128):
    groups = inputs // group_size
    return AwqArrays(
        awq_pack(rng.integers(0, 16, (inputs, outputs))).view(np.int32),
        awq_pack(rng.integers(0, 16, (groups, outputs))).view(np.int32),
        rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16),
    )


def test_awq_keeps_integers_and_joins_outputs():
    rng = np.random.default_rng(1)
    parts = [random_awq(rng, outputs, 256) for outputs in (16, 8, 24)]
    storage = awq_storage(NAME, 48, 256, AWQ)
    arrays = storage.store_encoded(parts)
    assert [(spec.name, spec.shape, spec.dtype) for spec in storage.outputs] == [
        ("x_proj.qweight", (256, 6), "uint32"),
        ("x_proj.qzeros", (2, 6), "uint32"),
        ("x_proj.scales", (2, 48), "float16"),
    ]
    assert [(array.shape, str(array.dtype)) for array in arrays] == [
        (spec.shape, spec.dtype) for spec in storage.outputs
    ]
    whole = awq_unpack(*arrays)
    alone = [
        awq_unpack(p.qweight.view(np.uint32), p.qzeros.view(np.uint32), p.scales) for p in parts
    ]
    np.testing.assert_array_equal(whole, np.concatenate(alone))


def test_awq_needs_a_checkpoint_of_its_kind():
    storage = awq_storage(NAME, 16, 128, AWQ)
    with pytest.raises(UnsupportedModel, match="name an AWQ repository, or choose q4f16_1"):
        storage.store(np.zeros((16, 128), np.float32))
    assert storage.store_encoded([object()]) is None
    with pytest.raises(UnsupportedModel, match="groups of 64, q4f16_autoawq has groups of 128"):
        storage.store_encoded([random_awq(np.random.default_rng(2), 16, 128, 64)])
    for shape in ((16, 96), (12, 128)):
        with pytest.raises(UnsupportedModel, match="multiple of 128 inputs and of 8 outputs"):
            awq_storage(NAME, *shape, AWQ)


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("shape", [(128, 128), (37, 300)])
def test_float8_bits_equal_the_definition(name, shape):
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 2, shape)).astype(np.float32)
    storage = float8_storage(NAME, *shape, get_scheme(name))
    arrays = storage.store(weight)
    expected = dict(FLOAT8[name](f"{NAME}.weight", weight))
    found = {spec.name: array for spec, array in zip(storage.outputs, arrays, strict=True)}
    assert found.keys() == expected.keys()
    for spec in storage.outputs:
        array = found[spec.name]
        assert (array.shape, str(array.dtype)) == (spec.shape, spec.dtype)
        np.testing.assert_array_equal(bytes_of(array), bytes_of(expected[spec.name]))
    value = read_float8(found, NAME)
    if name != "e5m2_e5m2_f16":
        assert np.abs(value - weight).max() <= np.abs(weight).max() / 448 * 16


def bytes_of(array):
    return np.ascontiguousarray(array).view(np.uint8)


def test_the_tables_are_those_of_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    for bits, dtype in ((4, ml_dtypes.float8_e4m3fn), (5, ml_dtypes.float8_e5m2)):
        table = float8_table(bits)
        np.testing.assert_array_equal(table, codes.view(dtype).astype(np.float64))
        finite = np.isfinite(table)
        np.testing.assert_array_equal(round_to_float8(table[finite], bits), codes[finite])


@pytest.mark.parametrize("name", FLOAT8)
def test_large_and_bad_values(name):
    storage = float8_storage(NAME, 16, 32, get_scheme(name))
    for array in storage.store(np.full((16, 32), 6e4, np.float32)):
        assert np.isfinite(array.astype(np.float32)).all()
    for array in storage.store(np.zeros((16, 32), np.float32)):
        assert np.isfinite(array.astype(np.float32)).all()
    with pytest.raises(CorruptFile, match="NaN or infinite"):
        storage.store(np.full((16, 32), np.inf, np.float32))


def random_blocks(rng, rows, columns, activation_scale=None):
    scale = rng.uniform(0.01, 0.1, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
    codes = rng.integers(0, 120, (rows, columns), dtype=np.uint8)
    return Float8Blocks(codes.view(ml_dtypes.float8_e4m3fn), scale, activation_scale)


def test_blocks_of_a_checkpoint_stay_as_they_are():
    rng = np.random.default_rng(4)
    parts = [random_blocks(rng, 256, 200, 0.5), random_blocks(rng, 128, 200, 2.0)]
    weight, scale = float8_storage(NAME, 384, 200, BLOCKS).store_encoded(parts)
    np.testing.assert_array_equal(bytes_of(weight[256:]), bytes_of(parts[1].weight))
    np.testing.assert_array_equal(scale[:2], parts[0].scale)
    np.testing.assert_array_equal(scale[2:], parts[1].scale)
    static = get_scheme("fp8_e4m3fn_bf16_block_scale_static_activation")
    arrays = float8_storage(NAME, 384, 200, static).store_encoded(parts)
    assert arrays[2].tolist() == [2.0]


def test_blocks_that_do_not_meet_are_refused():
    rng = np.random.default_rng(5)
    storage = float8_storage(NAME, 192, 128, BLOCKS)
    with pytest.raises(UnsupportedModel, match="blocks of 128 do not meet; choose q8f16_1"):
        storage.store_encoded([random_blocks(rng, 64, 128), random_blocks(rng, 128, 128)])
    odd = Float8Blocks(np.zeros((64, 64), ml_dtypes.float8_e4m3fn), np.ones((2, 1), np.float32))
    with pytest.raises(ParameterMismatch, match=r"block scales \[2, 1\]"):
        storage.store_encoded([odd])
    assert storage.store_encoded([object()]) is None


def test_what_is_not_portable_is_refused_by_name():
    with pytest.raises(OptionError, match=r"q4f16_ft is not portable.*choose q4f16_1"):
        get_scheme("q4f16_ft")
