"""Quantization of activations against its definition in NumPy, and fused with what comes before."""

import numpy as np
import pytest
from int8_cases import (
    FORMS,
    PLAIN,
    ROWS,
    build_quantizer,
    check_quantizer,
    isa_of,
    quantize,
    runnable_devices,
    unpack,
)

from mlc_llm.device import host_cpu
from mlc_llm.kernels.cpu import elementwise
from mlc_llm.kernels.cpu.activations import Int8Shape, Source
from mlc_llm.kernels.cpu.isa import find_isa

pytestmark = pytest.mark.cpu

BEST = find_isa(host_cpu().isa).name


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize("device", runnable_devices())
def test_codes_scales_and_starts_are_exact(build_for, rng, device, bits):
    shape = Int8Shape(16, 172, FORMS[bits], isa_of(device))
    check_quantizer(build_for(device), rng, shape)


@pytest.mark.parametrize("in_features", [1, 31, 32, 33, 576])
def test_groups_that_end_inside(build, rng, in_features):
    check_quantizer(build, rng, Int8Shape(16, in_features, FORMS["4 bits"], BEST), [1, 5])


def test_halves_go_to_the_even_code(build):
    shape = Int8Shape(16, 32, FORMS["8 bits"], BEST)
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 127, 0.5, 1.5, 2.5, -0.5, -3.5
    codes, scales, _ = unpack(build_quantizer(build, shape)(x), 1, shape)
    assert codes[0, 0, :6].tolist() == [127, 0, 2, 2, 0, -4] and scales.tolist() == [[1.0]]


def test_the_largest_magnitude_is_127_everywhere(build, rng):
    shape = Int8Shape(16, 160, FORMS["4 bits"], BEST)
    x = rng.standard_normal((64, 160)).astype(np.float32)
    codes, scales, starts = unpack(build_quantizer(build, shape)(x), 64, shape)
    assert (np.abs(codes).max(axis=2) == 127).all()
    restored = (codes * scales[..., None]).reshape(64, 160)
    steps = np.repeat(scales, 32, axis=1)
    assert (np.abs(restored - x) <= steps * (0.5 + 1e-5)).all()
    np.testing.assert_array_equal(starts, -7 * codes.sum(axis=2))


@pytest.mark.parametrize("width", [75, 172, 160])
@pytest.mark.parametrize("kind", ["rms_norm", "silu_mul"])
def test_what_is_fused_is_what_comes_apart(build, rng, kind, width):
    shape = Int8Shape(16, width, FORMS["4 bits"], BEST)
    source, apart, extra, x_width = parts_of(build, rng, kind, width)
    fused, plain = build_quantizer(build, shape, source), build_quantizer(build, shape, PLAIN)
    for n in ROWS:
        x = rng.standard_normal((n, x_width)).astype(np.float32) * 3
        rows = apart(x, *extra, shape=(n, width))
        found, expected = unpack(fused(x, *extra), n, shape), unpack(plain(rows), n, shape)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("device", runnable_devices())
@pytest.mark.parametrize("kind", ["rms_norm", "silu_mul"])
def test_fused_rows_against_numpy(build_for, rng, kind, device):
    build = build_for(device)
    shape = Int8Shape(16, 172, FORMS["4 bits"], isa_of(device))
    source, _, extra, x_width = parts_of(build, rng, kind, 172)
    kernel = build_quantizer(build, shape, source)
    x = rng.standard_normal((7, x_width)).astype(np.float32) * 3
    wide = x.astype(np.float64)
    if kind == "rms_norm":
        rows = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + source.eps)
        rows = rows * extra[0].astype(np.float64)
    else:
        rows = wide[:, :172] / (1 + np.exp(-wide[:, :172])) * wide[:, 172:]
    codes, scales, _ = unpack(kernel(x, *extra), 7, shape)
    expected_codes, expected_scales, _ = quantize(rows.astype(np.float32), shape)
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    # The last bit of a value may decide between two codes.
    assert np.abs(codes - expected_codes).max() <= 1
    assert (codes != expected_codes).mean() < 0.01
    for n in ROWS[:3]:
        alone = unpack(kernel(x[:n], *extra), n, shape)
        np.testing.assert_array_equal(alone[0], codes[:n])


def parts_of(build, rng, kind, width):
    """Return a source, its own kernel, that kernel's other inputs and the width of its rows."""
    if kind == "rms_norm":
        weight = rng.standard_normal(width).astype(np.float16)
        kernel = build(elementwise.rms_norm(width, "float16", 1e-5))
        return Source(kind, "float16", 1e-5), kernel, [weight], width
    return Source(kind), build(elementwise.silu_mul(width)), [], 2 * width
