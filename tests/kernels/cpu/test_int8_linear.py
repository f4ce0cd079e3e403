"""Linear layers with int8 activations against NumPy, as code for every CPU that this one runs."""

import numpy as np
import pytest
from int8_cases import (
    ARM_DEVICES,
    FORMS,
    GENERAL_FORMS,
    PLAIN,
    ROWS,
    X86_DEVICES,
    Layer,
    build_product,
    build_quantizer,
    check_product,
    check_quantizer,
    isa_of,
    product,
    runnable_devices,
)

from mlc_llm.artifact import numpy_dtype
from mlc_llm.device import host_cpu
from mlc_llm.kernels.cpu import group_linear, linear
from mlc_llm.kernels.cpu.activations import Int8Shape
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.isa import ISAS, find_isa
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.group import dequantize_group, quantize_group
from mlc_llm.quantization.schemes import get_scheme

# One of each way through the kernel.
FEW_ROWS = [1, 2, 3, 7, 13, 41, 64]
BEST = find_isa(host_cpu().isa).name


@pytest.mark.cpu
@pytest.mark.parametrize("bits", ["4 bits", "8 bits"])
@pytest.mark.parametrize("device", runnable_devices())
def test_products_are_exact(build_for, rng, device, bits):
    bias_dtype = "float16" if bits == "4 bits" else None
    layer = Layer(rng, 100, 172, FORMS[bits], bias_dtype)
    check_product(build_for(device), rng, layer, isa_of(device))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("out_features", "in_features", "bits", "bias_dtype"),
    [
        (64, 160, "4 bits", None),
        (48, 32, "8 bits", "float32"),
        (131, 36, "4 bits", "float16"),
        (37, 75, "8 bits", "bfloat16"),
        (16, 40, "3 bits", None),
    ],
)
def test_sizes_and_biases(build, rng, out_features, in_features, bits, bias_dtype):
    layer = Layer(rng, out_features, in_features, FORMS[bits], bias_dtype)
    check_product(build, rng, layer, BEST)


@pytest.mark.cpu
@pytest.mark.parametrize("form", GENERAL_FORMS)
def test_planes_and_minima(build, rng, form):
    layer = Layer(rng, 52, 172, FORMS[form], "float16")
    check_quantizer(build, rng, layer.shape(BEST), [1, 5])
    check_product(build, rng, layer, BEST, FEW_ROWS)


@pytest.mark.cpu
@pytest.mark.parametrize("form", ["5 bits, minimum", "8 bits, minimum"])
@pytest.mark.parametrize("device", runnable_devices())
def test_planes_and_minima_on_every_device(build_for, rng, device, form):
    layer = Layer(rng, 20, 76, FORMS[form])
    check_product(build_for(device), rng, layer, isa_of(device), FEW_ROWS)


@pytest.mark.cpu
@pytest.mark.parametrize("form", GENERAL_FORMS)
def test_float_path_and_embedding_of_planes_and_minima(build, rng, form):
    layer = Layer(rng, 52, 172, FORMS[form])
    weight = layer.weight * layer.scales[..., None] + layer.minima[..., None]
    weight = weight.reshape(52, -1)[:, :172]
    kernel = build(group_linear.matmul(52, 172, layer.form, None))
    for n in (1, 5):
        x = rng.standard_normal((n, 172)).astype(np.float32)
        found = kernel(x, *layer.packed, shape=(n, 52))
        magnitude = np.abs(x).astype(np.float64) @ np.abs(weight).T
        assert (np.abs(found - x.astype(np.float64) @ weight.T) <= 2e-6 * magnitude).all()
    ids = np.asarray([51, 0, 17], np.int32)
    rows = build(group_linear.embed(52, 172, layer.form))(ids, *layer.packed, shape=(3, 172))
    np.testing.assert_allclose(rows, weight[ids], rtol=1e-6, atol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_dtypes_of_scales(build, rng, scale_dtype):
    layer = Layer(rng, 37, 75, GroupFormat(4, 32, scale_dtype, False))
    check_product(build, rng, layer, BEST, [1, 5, 17, 41])


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["q3f16_0", "q3f16_1", "q4f16_0", "q4f16_1", "q8f16_1"])
def test_weights_of_both_layouts(build, rng, name):
    """From portable weights, (in, out) and (out, in), through the packing kernels."""
    out_features, in_features, n = 37, 172, 5
    scheme = get_scheme(name)
    portable = group_format(scheme, True)
    weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
    arrays = quantize_group(weight, scheme, transpose=portable.is_transposed)
    form = portable.with_byte_codes()
    layer = Layer(rng, out_features, in_features, form)
    layer.packed = [
        build(kernel)(array, shape=shape(out_features, in_features), dtype=array.dtype)
        for array, shape, kernel in zip(
            arrays,
            (form.word_shape, form.scale_shape),
            packing_kernels(arrays, portable, out_features, in_features),
            strict=True,
        )
    ]
    x = rng.integers(-127, 128, (n, in_features)).astype(np.float32)
    x[:, ::8] = 127  # every group has the scale 1: nothing is rounded
    quantized = build_quantizer(build, layer.shape(BEST))(x)
    found = build_product(build, layer, BEST)(quantized, n)
    value = dequantize_group(*arrays, scheme, in_features, transposed=portable.is_transposed)
    expected = x.astype(np.float64) @ value.astype(np.float64).T
    magnitude = np.abs(x).astype(np.float64) @ np.abs(value).astype(np.float64).T
    # Stored values are products rounded to float32 or less.
    assert (np.abs(found - expected) <= 1e-6 * magnitude).all()


def packing_kernels(arrays, form, out_features, in_features):
    for array in arrays:
        columns = array.shape[0 if form.is_transposed else 1]
        if array.dtype == np.uint32 and form.bits == 3:
            yield group_linear.widen_codes(out_features, in_features, form)
        else:
            yield linear.interleave(out_features, columns, array.dtype.name, form.is_transposed)


@pytest.mark.cpu
def test_rounding_of_any_input(build, rng):
    layer = Layer(rng, 16, 75, FORMS["4 bits"])
    quantizer, multiply = (
        build_quantizer(build, layer.shape(BEST), PLAIN),
        build_product(build, layer, BEST),
    )
    x = rng.standard_normal((8, 75)).astype(np.float32)
    x[1] = 0
    x[2, 32:64] = 0
    x[3] *= 1e30
    x[4] *= 1e-30
    x[5, 7] = 1e4
    x[6] *= 1e-40
    weight = (layer.weight * layer.scales[..., None]).reshape(16, -1)[:, :75]
    exact = x.astype(np.float64) @ weight.T
    found = multiply(quantizer(x), 8)
    assert np.isfinite(found).all() and (found[1] == 0).all() and (np.abs(found[6]) < 1e-20).all()
    for row in (0, 2, 3, 4, 5, 7):
        step = np.abs(x[row].astype(np.float64)).max() / 127
        assert np.abs(found[row] - exact[row]).max() < step / 2 * 75 * 7 * 1.5


@pytest.mark.cpu
def test_every_product_of_two_codes(build):
    """All 8-bit codes against all int8 values, on the widest vectors this CPU has."""
    rng = np.random.default_rng(5)
    layer = Layer(rng, 255, 32, FORMS["8 bits"])
    codes = np.repeat(np.arange(255, dtype=np.uint32)[:, None], 32, axis=1)
    padded = np.vstack([codes, codes[:1]])
    words = (padded.reshape(256, -1, 4) << np.arange(0, 32, 8, dtype=np.uint32)).sum(
        axis=2, dtype=np.uint32
    )
    layer.packed = [
        np.ascontiguousarray(words.reshape(-1, 16, 8).swapaxes(1, 2)),
        np.ones((16, 1, 16), numpy_dtype("float16")),
    ]
    layer.weight, layer.scales = codes.astype(np.int64)[:, None] - 127, np.ones((255, 1))
    values = np.zeros((255, 32), np.float32)
    values[:, 0], values[:, 1] = 127, np.arange(-127, 128)
    shape: Int8Shape = layer.shape(BEST)
    found = build_product(build, layer, BEST)(build_quantizer(build, shape)(values), 255)
    expected, _ = product(layer, values.astype(np.int64)[:, None], np.ones((255, 1), np.float32))
    np.testing.assert_array_equal(found, expected)


def test_instruction_sets_are_found_by_what_they_need():
    assert find_isa(["x86-64-v4", "avx512vnni"]).name == "avx512vnni"
    assert find_isa(["x86-64-v4"]).name == "avx2"
    assert find_isa(["x86-64-v3", "avxvnni"]).name == "avxvnni"
    assert find_isa(["x86-64-v3"]).name == "avx2"
    assert find_isa(["x86-64-v2"]).name == "generic"
    assert find_isa(["neon", "dotprod", "fullfp16"]).name == "neon-dotprod"
    assert find_isa(["neon"]).name == "generic"


def test_devices_of_the_tests_use_every_instruction_set():
    assert {isa_of(device) for device in X86_DEVICES + ARM_DEVICES} == {isa.name for isa in ISAS}
    assert BEST in {isa_of(device) for device in runnable_devices()}
    assert ROWS[0] == 1 and runnable_devices()
