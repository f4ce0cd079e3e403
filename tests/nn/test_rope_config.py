"""Inverse frequencies of rotary embeddings with the scalings of published models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlc_llm.errors import CorruptFile, UnsupportedModel
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


def test_llama3_without_a_ramp() -> None:
    scaling = {**LLAMA3, "high_freq_factor": 1.0}  # Llama 4
    found = RopeConfig(500000.0, 128, scaling).inverse_frequencies()
    frequencies = plain(500000.0, 128)
    slow = 8192 * frequencies / (2 * math.pi) < 1
    assert 0 < slow.sum() < len(slow)
    np.testing.assert_allclose(found, np.where(slow, frequencies / 8, frequencies), rtol=1e-6)


def test_dynamic_raises_the_base_beyond_what_was_trained() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 100}
    within = RopeConfig(10000.0, 32, scaling, context_len=100).inverse_frequencies()
    np.testing.assert_allclose(within, plain(10000.0, 32), rtol=1e-6)
    beyond = RopeConfig(10000.0, 32, scaling, context_len=300).inverse_frequencies()
    np.testing.assert_allclose(beyond, plain(10000.0 * 9 ** (32 / 30), 32), rtol=1e-5)


def test_yarn_keeps_fast_and_stretches_slow_rotations() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    rope = RopeConfig(10000.0, 64, scaling)
    found, frequencies = rope.inverse_frequencies(), plain(10000.0, 64)
    turns = 4096 * frequencies / (2 * math.pi)
    np.testing.assert_allclose(found[turns > 40], frequencies[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(found[turns < 0.8], frequencies[turns < 0.8] / 4, rtol=1e-6)
    between = (turns > 1.5) & (turns < 25)
    assert (found[between] < frequencies[between]).all()
    assert (found[between] > frequencies[between] / 4).all()
    assert rope.table_scale == pytest.approx(0.1 * math.log(4) + 1)
    own = RopeConfig(10000.0, 64, {**scaling, "attention_factor": 1.25})
    assert own.table_scale == 1.25
    # DeepSeek: the ratio of two magnitudes.
    both = RopeConfig(10000.0, 64, {**scaling, "mscale": 0.7, "mscale_all_dim": 0.7})
    assert both.table_scale == 1.0


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_has_factors_for_short_and_long(kind) -> None:
    scaling = {
        "rope_type": kind,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 256,
    }
    short = RopeConfig(10000.0, 8, scaling, context_len=256)
    np.testing.assert_allclose(
        short.inverse_frequencies(), plain(10000.0, 8) / scaling["short_factor"], rtol=1e-6
    )
    assert short.table_scale == 1.0
    long = RopeConfig(10000.0, 8, scaling, context_len=1024)
    np.testing.assert_allclose(
        long.inverse_frequencies(), plain(10000.0, 8) / scaling["long_factor"], rtol=1e-6
    )
    assert long.table_scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))
    with pytest.raises(CorruptFile, match="long_factor has 4 values, not 8"):
        RopeConfig(10000.0, 16, scaling, context_len=1024).inverse_frequencies()


def test_unknown_scaling_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"'spiral' is not supported; supported: .*llama3"):
        RopeConfig(10000.0, 32, {"rope_type": "spiral", "factor": 2.0}).inverse_frequencies()
    with pytest.raises(CorruptFile, match=r"'linear' has missing or wrong values.*factor"):
        RopeConfig(10000.0, 32, {"rope_type": "linear"}).inverse_frequencies()
    assert scaling_kind({"type": "yarn"}) == "yarn"
    assert scaling_kind(None) == scaling_kind({"factor": 2}) == "default"
