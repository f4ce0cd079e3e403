"""Packing against an element-by-element reading of the format, written out here on its own."""

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from mlc_llm.artifact import numpy_dtype
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.quantization.group import dequantize_group, packed_specs, quantize_group
from mlc_llm.quantization.schemes import SCHEMES, get_scheme

GROUPED = [name for name, scheme in SCHEMES.items() if scheme.kind == "group"]


def naive_pack(weight, bits, group_size, dtype):
    """Return (words as a list of lists of int, scales as a list of lists) for weight (N, K)."""
    per_word, largest_code = 32 // bits, 2 ** (bits - 1) - 1
    all_words, all_scales = [], []
    for row in weight:
        row = [float(np.float32(value)) for value in row]
        words, scales = [], []
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            largest = np.float32(max(abs(value) for value in group))
            scale = np.array(largest / np.float32(largest_code)).astype(dtype)
            scales.append(scale)
            codes = []
            for value in group:
                if float(scale) == 0:
                    codes.append(largest_code)
                    continue
                ratio = np.float32(value) / np.float32(scale) + np.float32(largest_code)
                # Python's round() is half to even, as the format asks.
                codes.append(min(max(round(float(ratio)), 0), 2 * largest_code))
            codes += [0] * (group_size - len(codes))
            for first in range(0, group_size, per_word):
                word = 0
                for place, code in enumerate(codes[first : first + per_word]):
                    word |= code << (place * bits)
                words.append(word)
        all_words.append(words)
        all_scales.append(scales)
    return np.array(all_words, np.uint32), np.array(all_scales, dtype)


def random_weight(shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(dtype)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("shape", [(3, 160), (5, 97), (1, 7)])
def test_bits_equal_the_naive_packer(name, shape):
    scheme = get_scheme(name)
    weight = random_weight(shape)
    words, scales = naive_pack(weight, scheme.bits, scheme.group_size, numpy_dtype(scheme.dtype))
    q_weight, q_scale = quantize_group(weight, scheme, transpose=False)
    assert q_weight.dtype == np.uint32
    assert q_scale.dtype == numpy_dtype(scheme.dtype)
    np.testing.assert_array_equal(q_weight, words)
    np.testing.assert_array_equal(q_scale, scales)
    transposed = quantize_group(weight, scheme, transpose=True)
    np.testing.assert_array_equal(transposed[0], words.T)
    np.testing.assert_array_equal(transposed[1], scales.T)


def test_known_word_of_int4():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :8] = [-7, -6, 0, 1, 2, 3, 6, 7]
    q_weight, q_scale = quantize_group(weight, get_scheme("q4f32_1"), transpose=False)
    assert hex(q_weight[0, 0]) == "0xeda98710"
    assert q_scale[0, 0] == 1.0


def test_int3_leaves_the_top_two_bits_zero():
    q_weight, _ = quantize_group(random_weight((4, 80)), get_scheme("q3f16_1"), transpose=False)
    assert not (q_weight >> 30).any()


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("transpose", [False, True])
def test_round_trip_error_is_half_a_scale(name, transpose):
    scheme = get_scheme(name)
    weight = random_weight((9, 203), seed=1)
    q_weight, q_scale = quantize_group(weight, scheme, transpose=transpose)
    specs = packed_specs("x", (9, 203), scheme, transpose=transpose)
    assert [spec.shape for spec in specs] == [q_weight.shape, q_scale.shape]
    assert [spec.name for spec in specs] == ["x.q_weight", "x.q_scale"]
    back = dequantize_group(q_weight, q_scale, scheme, 203, transposed=transpose)
    scale = (q_scale.T if transpose else q_scale).astype(np.float32)
    bound = np.repeat(scale, scheme.group_size, axis=1)[:, :203] / 2
    assert (np.abs(back - weight) <= bound * 1.001).all()


@pytest.mark.parametrize("name", GROUPED)
def test_zero_groups_come_back_as_zero(name):
    scheme = get_scheme(name)
    weight = np.zeros((2, 3 * scheme.group_size), np.float32)
    weight[1, 0] = 1.0
    weight[0, 1] = 1e-30  # below every float16 scale
    q_weight, q_scale = quantize_group(weight, scheme, transpose=False)
    assert (q_scale[:, 1:] == 0).all()
    back = dequantize_group(q_weight, q_scale, scheme, weight.shape[1], transposed=False)
    np.testing.assert_allclose(back, weight, atol=5e-3)
    assert not back[:, scheme.group_size :].any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_input_equals_its_float32_copy(dtype):
    weight = random_weight((4, 64), dtype=dtype)
    scheme = get_scheme("q4f16_1")
    from_half = quantize_group(weight, scheme, transpose=False)
    from_single = quantize_group(weight.astype(np.float32), scheme, transpose=False)
    np.testing.assert_array_equal(from_half[0], from_single[0])
    np.testing.assert_array_equal(from_half[1], from_single[1])


def test_stacked_experts_are_packed_one_by_one():
    weight = random_weight((3, 5, 64))
    scheme = get_scheme("q4f16_1")
    q_weight, q_scale = quantize_group(weight, scheme, transpose=False)
    assert q_weight.shape == (3, 5, 8)
    for expert in range(3):
        alone = quantize_group(weight[expert], scheme, transpose=False)
        np.testing.assert_array_equal(q_weight[expert], alone[0])
        np.testing.assert_array_equal(q_scale[expert], alone[1])
    back = dequantize_group(q_weight, q_scale, scheme, 64, transposed=False)
    assert np.abs(back - weight).max() < 0.02


def test_many_blocks_equal_one_block(monkeypatch):
    weight = random_weight((50, 96))
    scheme = get_scheme("q4f16_0")
    whole = quantize_group(weight, scheme, transpose=True)
    monkeypatch.setattr("mlc_llm.quantization.group._BLOCK_VALUES", 96 * 7)
    parts = quantize_group(weight, scheme, transpose=True)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])
    assert parts[0].flags.c_contiguous
    back = dequantize_group(*parts, scheme, 96, transposed=True)
    assert np.abs(back - weight).max() < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_weights_are_refused(bad):
    weight = random_weight((2, 64))
    weight[1, 3] = bad
    with pytest.raises(CorruptFile, match="NaN or infinite"):
        quantize_group(weight, get_scheme("q4f16_1"), transpose=False)


def test_weights_too_large_for_the_scale_are_refused():
    weight = np.full((1, 32), 1e6, np.float32)
    with pytest.raises(UnsupportedModel, match="too large for the float16 scales of q4f16_1"):
        quantize_group(weight, get_scheme("q4f16_1"), transpose=False)
    q_weight, q_scale = quantize_group(weight, get_scheme("q4f32_1"), transpose=False)
    back = dequantize_group(q_weight, q_scale, get_scheme("q4f32_1"), 32, transposed=False)
    np.testing.assert_allclose(back, weight, rtol=1e-6)


_MEMORY_SCRIPT = """
import resource, sys
import ml_dtypes, numpy as np
from mlc_llm.quantization.group import quantize_group
from mlc_llm.quantization.schemes import get_scheme
weight = np.ones((60000, 2048), ml_dtypes.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q_weight, q_scale = quantize_group(weight, get_scheme("q4f16_1"), transpose=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) // 1024 - (q_weight.nbytes + q_scale.nbytes) // 2**20)
"""


def test_a_large_embedding_needs_no_float32_copy():
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT], capture_output=True, text=True, check=True
    )
    # A float32 copy alone would be 469 MiB.
    assert int(done.stdout) < 350
