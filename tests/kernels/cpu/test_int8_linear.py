"""Linear layers with int8 activations against NumPy, on every instruction set this CPU has."""

import numpy as np
import pytest

from mlc_llm.artifact import numpy_dtype
from mlc_llm.device import host_cpu
from mlc_llm.kernels.cpu import activations, elementwise, int8_linear
from mlc_llm.kernels.cpu.activations import TILE, Int8Shape, Source
from mlc_llm.kernels.cpu.group_linear import GroupFormat
from mlc_llm.kernels.cpu.isa import ISAS, find_isa

# Each way through the kernel: one token, two, a tile, several tiles, unpacked weights.
ROWS = [1, 2, 3, 5, 16, 17, 37]
PLAIN = Source()
BEST = find_isa(host_cpu().isa).name
FORMS = {
    4: GroupFormat(4, 32, "float16", False),
    8: GroupFormat(8, 32, "float16", False),
}


def runnable_isas():
    """Return the names of the instruction sets that the CPU of the test has."""
    features = set(host_cpu().isa)
    if "x86-64-v4" in features:
        features.add("x86-64-v3")
    return [isa.name for isa in ISAS if isa.needs <= features]


class Layer:
    """Random codes and scales in the packed layout, and what they stand for."""

    def __init__(self, rng, out_features, in_features, form, bias_dtype=None):
        self.form, self.in_features, self.out_features = form, in_features, out_features
        self.groups = form.num_groups(in_features)
        blocks = -(-out_features // 16)
        width = self.groups * form.group_size
        codes = rng.integers(0, 2 * form.zero_point + 1, (blocks * 16, width), dtype=np.uint32)
        codes[0] = 2 * form.zero_point  # the largest sums there can be
        codes[1] = 0
        scales = rng.uniform(0.5, 1.5, (blocks * 16, self.groups))
        self.scales = scales.astype(numpy_dtype(form.scale_dtype))
        self.codes = codes.astype(np.int64) - form.zero_point
        per_word = form.values_per_word
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(form.bits)
        words = (codes.reshape(len(codes), -1, per_word) << shifts).sum(axis=2, dtype=np.uint32)
        self.packed = [interleave(words), interleave(self.scales)]
        self.bias = None
        if bias_dtype is not None:
            self.bias = rng.standard_normal(out_features).astype(numpy_dtype(bias_dtype))

    def expected(self, x):
        """Multiply activations rounded to int8 with the weight, in float64."""
        size = self.form.group_size
        groups = np.zeros((len(x), self.groups, size))
        groups.reshape(len(x), -1)[:, : self.in_features] = x
        scale = np.abs(groups).max(axis=2, keepdims=True) / 127
        rounded = np.rint(groups / np.where(scale == 0, 1, scale))
        weight = self.codes.reshape(-1, self.groups, size)[: self.out_features]
        sums = np.einsum("ngs,ogs->nog", rounded, weight)
        out = (sums * scale[:, None, :, 0] * self.scales[None, : self.out_features]).sum(axis=2)
        return out if self.bias is None else out + self.bias.astype(np.float64)


def interleave(rows):
    return np.ascontiguousarray(rows.reshape(-1, 16, rows.shape[1]).swapaxes(1, 2))


def make_activations(rng, n, width, group_size):
    """Return random rows in which each group lies exactly on the int8 grid of its scale."""
    codes = rng.integers(-126, 127, (n, width)).astype(np.float64)
    codes[:, ::group_size] = 127
    scales = 2.0 ** rng.integers(-3, 3, (n, -(-width // group_size)))
    return (codes * np.repeat(scales, group_size, axis=1)[:, :width]).astype(np.float32)


def compile_layer(build, layer, isa, source=PLAIN):
    """Return a function from what `source` reads to the product."""
    shape = Int8Shape(layer.out_features, layer.in_features, layer.form, isa)
    bias_dtype = None if layer.bias is None else layer.bias.dtype.name
    matmul = build(int8_linear.matmul(shape, bias_dtype))
    quantize = build(activations.quantize_activations(shape, source))
    extra = [] if layer.bias is None else [layer.bias]

    def call(*inputs):
        n = len(inputs[0])
        out_shape = (-(-n // TILE), shape.width * TILE)
        quantized = quantize(*inputs, shape=out_shape, dtype=np.int32)
        return matmul(quantized, *layer.packed, *extra, shape=(n, layer.out_features))

    return call


@pytest.mark.cpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("isa", runnable_isas())
def test_products_are_exact(build, rng, isa, bits):
    layer = Layer(rng, 37, 75, FORMS[bits])
    multiply = compile_layer(build, layer, isa)
    for n in ROWS:
        x = make_activations(rng, n, 75, 32)
        expected = layer.expected(x)
        np.testing.assert_allclose(multiply(x), expected, rtol=2e-6, atol=2e-6 * 127 * 75)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("out_features", "in_features", "bits", "bias_dtype"),
    [(64, 160, 4, None), (48, 32, 8, "float32"), (131, 36, 4, "float16"), (37, 75, 8, "bfloat16")],
)
def test_sizes_and_biases(build, rng, out_features, in_features, bits, bias_dtype):
    layer = Layer(rng, out_features, in_features, FORMS[bits], bias_dtype)
    multiply = compile_layer(build, layer, BEST)
    for n in ROWS:
        x = make_activations(rng, n, in_features, 32)
        tolerance = 2e-6 * np.abs(x).max() * in_features * 128
        np.testing.assert_allclose(multiply(x), layer.expected(x), rtol=2e-6, atol=tolerance)


@pytest.mark.cpu
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_dtypes_of_scales(build, rng, scale_dtype):
    layer = Layer(rng, 37, 75, GroupFormat(4, 32, scale_dtype, False))
    multiply = compile_layer(build, layer, BEST)
    x = make_activations(rng, 5, 75, 32)
    np.testing.assert_allclose(multiply(x), layer.expected(x), rtol=2e-6, atol=2e-2)


@pytest.mark.cpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_batch(build, rng, bits):
    layer = Layer(rng, 64, 75, FORMS[bits])
    multiply = compile_layer(build, layer, BEST)
    x = rng.standard_normal((37, 75)).astype(np.float32)
    together = multiply(x)
    for n in ROWS:
        np.testing.assert_allclose(multiply(x[:n]), together[:n], rtol=1e-6, atol=1e-5)


@pytest.mark.cpu
def test_rounding_of_any_input(build, rng):
    layer = Layer(rng, 16, 75, FORMS[4])
    multiply = compile_layer(build, layer, BEST)
    x = rng.standard_normal((8, 75)).astype(np.float32)
    x[1] = 0
    x[2, 32:64] = 0
    x[3] *= 1e30
    x[4] *= 1e-30
    x[5, 7] = 1e4
    x[6] *= 1e-40
    exact = x.astype(np.float64) @ (layer.codes * np.repeat(layer.scales, 32, 1))[:16, :75].T
    found = multiply(x)
    assert np.isfinite(found).all() and (found[1] == 0).all() and (np.abs(found[6]) < 1e-20).all()
    for row in (0, 2, 3, 4, 5, 7):
        step = np.abs(x[row].astype(np.float64)).max() / 127
        assert np.abs(found[row] - exact[row]).max() < step / 2 * 75 * 7 * 1.5


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["rms_norm", "silu_mul"])
def test_what_is_fused_is_what_comes_apart(build, rng, kind):
    layer = Layer(rng, 64, 75, FORMS[4])
    if kind == "rms_norm":
        source = Source(kind, "float16", 1e-5)
        apart = build(elementwise.rms_norm(75, "float16", 1e-5))
        width, extra = 75, [rng.standard_normal(75).astype(np.float16)]
    else:
        source, apart, width, extra = Source(kind), build(elementwise.silu_mul(75)), 150, []
    fused, plain = compile_layer(build, layer, BEST, source), compile_layer(build, layer, BEST)
    for n in ROWS:
        x = rng.standard_normal((n, width)).astype(np.float32)
        expected = plain(apart(x, *extra, shape=(n, 75)))
        found = fused(x, *extra)
        # The last bit of a value may decide between two codes.
        assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)
        assert np.median(np.abs(found - expected)) < 1e-4


def test_instruction_sets_are_found_by_what_they_need():
    assert find_isa(["x86-64-v4", "avx512vnni"]).name == "avx512vnni"
    assert find_isa(["x86-64-v4"]).name == "avx2"
    assert find_isa(["x86-64-v3", "avxvnni"]).name == "avxvnni"
    assert find_isa(["x86-64-v3"]).name == "avx2"
    assert find_isa(["x86-64-v2"]).name == "generic"
    assert find_isa(["neon", "dotprod", "fullfp16"]).name == "neon-dotprod"
    assert find_isa(["neon"]).name == "generic"
    assert runnable_isas()[-1] == "generic"
