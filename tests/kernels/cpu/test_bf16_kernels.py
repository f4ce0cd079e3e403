"""Linear layers on pairs of bfloat16 against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from mlc_llm.device import host_cpu
from mlc_llm.kernels.cpu import bf16_activations, bf16_linear
from mlc_llm.kernels.cpu.activations import Source
from mlc_llm.kernels.cpu.bf16_activations import ROW_STEP, num_pairs, row_words
from mlc_llm.kernels.cpu.isa import BF16_ISAS, find_bf16_isa, get_bf16_isa

ISA = find_bf16_isa(host_cpu().isa)

needs_bf16 = pytest.mark.skipif(ISA is None, reason="this CPU does not multiply bfloat16")


def bf16(rng, *shape):
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def as_words(values):
    """Join neighbours of (rows, columns) bfloat16 into words, zeros to whole vectors of pairs."""
    rows, columns = values.shape
    padded = np.zeros((rows, 2 * num_pairs(columns)), ml_dtypes.bfloat16)
    padded[:, :columns] = values
    return padded.view(np.uint32)


def pack(weight):
    """Interleave 32 rows of words, rows past the end zero."""
    words = as_words(weight)
    panels = bf16_linear.num_panels(len(weight))
    rows = np.zeros((panels * 32, words.shape[1]), np.uint32)
    rows[: len(weight)] = words
    return np.ascontiguousarray(rows.reshape(panels, 32, -1).swapaxes(1, 2))


def rounded(x):
    """Return rounded activations of tokens in the kernel's layout; what is unused is NaN."""
    rows = -(-len(x) // ROW_STEP) * ROW_STEP
    out = np.full((rows, row_words(x.shape[1])), -1, np.int32)
    out[: len(x), : num_pairs(x.shape[1])] = as_words(x.astype(ml_dtypes.bfloat16)).view(np.int32)
    return out


def test_isa_is_found_by_features():
    assert find_bf16_isa(["x86-64-v4", "avx512bf16", "avxvnni"]).name == "avx512bf16"
    assert find_bf16_isa(["x86-64-v4", "avx512vnni"]) is None
    assert find_bf16_isa(["x86-64-v3"]) is None
    assert all(get_bf16_isa(isa.name) is isa for isa in BF16_ISAS)


@pytest.mark.cpu
@pytest.mark.parametrize(("out_features", "in_features"), [(37, 20), (32, 75), (1, 1), (70, 64)])
def test_pack(build, rng, out_features, in_features):
    weight = bf16(rng, out_features, in_features)
    kernel = build(bf16_linear.pack(out_features, in_features))
    shape = bf16_linear.packed_shape(out_features, in_features)
    np.testing.assert_array_equal(kernel(weight, shape=shape, dtype=np.uint32), pack(weight))


@pytest.mark.cpu
@pytest.mark.parametrize(("num_embeddings", "features"), [(131, 36), (32, 75)])
def test_embed(build, rng, num_embeddings, features):
    kernel = build(bf16_linear.embed(num_embeddings, features))
    table = bf16(rng, num_embeddings, features)
    for ids in ([num_embeddings - 1], [0, 3, 3, 15, 31], list(range(20))):
        index = np.asarray(ids, np.int32)
        found = kernel(index, pack(table), shape=(len(ids), features))
        np.testing.assert_array_equal(found, table[index].astype(np.float32))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.cpu
@needs_bf16
@pytest.mark.parametrize("features", [64, 75, 1, 32, 172])
@pytest.mark.parametrize("kind", ["plain", "rms_norm", "silu_mul"])
def test_round(build, rng, kind, features):
    weight = bf16(rng, features)
    kernel = build(
        bf16_activations.round_activations(features, Source(kind, "bfloat16", 1e-5), ISA.name)
    )
    for n in (1, 3, 6):
        x = rng.standard_normal((n, features * (2 if kind == "silu_mul" else 1))).astype(np.float32)
        inputs, exact = [x], x.astype(np.float64)
        if kind == "rms_norm":
            inputs.append(weight)
            exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * weight.astype(float)
        elif kind == "silu_mul":
            exact = silu(exact[:, :features]) * exact[:, features:]
        rows = -(-n // ROW_STEP) * ROW_STEP
        out = kernel(*inputs, shape=(rows, row_words(features)), dtype=np.int32)
        values = np.ascontiguousarray(out[:n, : num_pairs(features)]).view(ml_dtypes.bfloat16)
        assert (values[:, features:] == 0).all()
        if kind == "plain":
            np.testing.assert_array_equal(values[:, :features], x.astype(ml_dtypes.bfloat16))
        else:
            # Half a unit in the last of 8 bits.
            np.testing.assert_allclose(
                values[:, :features].astype(float), exact, rtol=2**-8, atol=1e-6
            )


@pytest.mark.cpu
@needs_bf16
def test_rounding_to_even_and_what_is_not_finite(build):
    ulp = 2.0**-7
    x = np.asarray([[1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp * 0.51, -3.4e38, np.inf, np.nan]], "f4")
    kernel = build(bf16_activations.round_activations(6, Source(), ISA.name))
    out = kernel(x, shape=(ROW_STEP, row_words(6)), dtype=np.int32)
    values = np.ascontiguousarray(out[0, :3]).view(ml_dtypes.bfloat16).astype(np.float32)
    expected = [1, 1 + 2 * ulp, 1 + ulp, -np.inf, np.inf, np.nan]
    np.testing.assert_array_equal(values, np.asarray(expected, np.float32))


@pytest.mark.cpu
@needs_bf16
@pytest.mark.parametrize(
    ("out_features", "in_features", "bias"),
    [
        (64, 64, None),
        (37, 75, "bfloat16"),
        (3, 1, None),
        (32, 36, "bfloat16"),
        (131, 96, "float32"),
    ],
)
def test_matmul(build, rng, out_features, in_features, bias):
    kernel = build(bf16_linear.matmul(out_features, in_features, ISA.name, bias))
    weight = bf16(rng, out_features, in_features)
    add = rng.standard_normal(out_features)
    for n in (1, 2, 5, 8, 11, 12, 13, 37):
        x = rng.standard_normal((n, in_features)).astype(ml_dtypes.bfloat16)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        inputs = [rounded(x), pack(weight)]
        if bias is not None:
            inputs.append(add.astype(ml_dtypes.bfloat16 if bias == "bfloat16" else bias))
            expected = expected + inputs[-1].astype(np.float64)
        found = kernel(*inputs, shape=(n, out_features))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.cpu
@needs_bf16
def test_a_row_is_the_same_to_the_bit_in_any_batch(build, rng):
    features, outputs, source = 331, 100, Source("silu_mul")
    to_pairs = build(bf16_activations.round_activations(features, source, ISA.name))
    multiply = build(bf16_linear.matmul(outputs, features, ISA.name, None))
    weight = pack(bf16(rng, outputs, features))

    def linear(x):
        rows = -(-len(x) // ROW_STEP) * ROW_STEP
        pairs = to_pairs(x, shape=(rows, row_words(features)), dtype=np.int32)
        return multiply(pairs, weight, shape=(len(x), outputs)).copy()

    x = rng.standard_normal((29, 2 * features)).astype(np.float32)
    together = linear(x)
    for start, stop in ((0, 1), (28, 29), (3, 5), (4, 9), (1, 13), (7, 23)):
        np.testing.assert_array_equal(linear(x[start:stop]), together[start:stop])
