"""Inverse frequencies of rotary embeddings with the scalings of published models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlc_llm.errors import UnsupportedModel
from mlc_llm.nn.rope import RopeConfig, scaling_kind

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def plain(base: float, rotary_dim: int) -> np.ndarray:
    return base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


@pytest.mark.parametrize(("base", "rotary_dim"), [(10000.0, 64), (500000.0, 20), (1e6, 2)])
@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}])
def test_without_scaling(base, rotary_dim, scaling) -> None:
    found = RopeConfig(base, rotary_dim, scaling).inverse_frequencies()
    assert (found.shape, found.dtype) == ((rotary_dim // 2,), np.float32)
    np.testing.assert_allclose(found, plain(base, rotary_dim), rtol=1e-6)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_linear(key) -> None:
    found = RopeConfig(10000.0, 32, {key: "linear", "factor": 4.0}).inverse_frequencies()
    np.testing.assert_allclose(found, plain(10000.0, 32) / 4, rtol=1e-6)


def test_llama3_keeps_fast_and_stretches_slow_rotations() -> None:
    found = RopeConfig(500000.0, 128, LLAMA3).inverse_frequencies()
    frequencies = plain(500000.0, 128)
    for value, frequency in zip(found, frequencies, strict=True):
        turns = 8192 * frequency / (2 * math.pi)
        if turns > 4:
            expected = frequency
        elif turns < 1:
            expected = frequency / 8
        else:
            kept = (turns - 1) / (4 - 1)
            expected = kept * frequency + (1 - kept) * frequency / 8
        assert value == pytest.approx(expected, rel=1e-5)
    assert (np.diff(found) < 0).all()


def test_unknown_scaling_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"'yarn' is not supported; supported: .*llama3"):
        RopeConfig(10000.0, 32, {"rope_type": "yarn", "factor": 2.0}).inverse_frequencies()
    assert scaling_kind({"type": "yarn"}) == "yarn"
    assert scaling_kind(None) == scaling_kind({"factor": 2}) == "default"
