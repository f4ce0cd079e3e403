"""The choice of a token from logits, against naive arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.sampling import SamplingParams, choose_token
from mlc_llm.errors import OptionError

VOCAB = 40


@pytest.fixture
def logits() -> np.ndarray:
    return (2 * np.random.default_rng(4).standard_normal(VOCAB)).astype(np.float32)


def draw(logits: np.ndarray, count: int, seed: int = 0, **params: Any) -> Counter[int]:
    random = np.random.default_rng(seed)
    settings = SamplingParams(**params)
    return Counter(
        choose_token(FakeRunner(), logits, settings, [], [], random) for _ in range(count)
    )


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return weights / weights.sum()


def check_frequencies(counts: Counter[int], expected: np.ndarray) -> None:
    """Hold each frequency within five standard deviations."""
    total = sum(counts.values())
    for token, probability in enumerate(expected):
        deviation = math.sqrt(total * probability * (1 - probability))
        assert abs(counts[token] - total * probability) <= 5 * deviation + 1e-9


def penalized(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int]
) -> list[float]:
    """Apply the penalties one token at a time."""
    out = [float(value) for value in logits]
    for token in set(prompt) | set(generated):
        factor = params.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in set(generated):
        out[token] -= params.presence_penalty
        out[token] -= params.frequency_penalty * generated.count(token)
    return out


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1e-9}])
def test_greedy_takes_the_likeliest(logits, params) -> None:
    assert draw(logits, 20, **params) == {int(logits.argmax()): 20}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_follow_the_softmax(logits, temperature) -> None:
    counts = draw(logits, 20_000, temperature=temperature)
    check_frequencies(counts, softmax(logits, temperature))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_of_that_mass(logits, top_p) -> None:
    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    kept = order[:count]
    assert probabilities[kept].sum() >= top_p > probabilities[kept[:-1]].sum()
    expected = np.zeros(VOCAB)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    check_frequencies(draw(logits, 20_000, top_p=top_p), expected)


def test_top_p_of_a_flat_large_vocabulary() -> None:
    logits = np.zeros(5000, np.float32)
    counts = draw(logits, 4000, top_p=0.5)
    assert 1500 < len(counts) <= 2500


def test_seed_decides(logits) -> None:
    def answer(seed: int) -> list[int]:
        random = np.random.default_rng(seed)
        return [
            choose_token(FakeRunner(), logits, SamplingParams(), [], [], random) for _ in range(30)
        ]

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -1.0, "frequency_penalty": 2.0, "repetition_penalty": 1.2},
    ],
)
def test_penalties_equal_naive_ones(logits, changes) -> None:
    params = SamplingParams(temperature=0.0, **changes)
    rng = np.random.default_rng(9)
    before = logits.copy()
    for _ in range(50):
        prompt = rng.integers(0, VOCAB, 6).tolist()
        generated = rng.integers(0, VOCAB, rng.integers(0, 12)).tolist()
        expected = int(np.argmax(penalized(logits, params, prompt, generated)))
        assert choose_token(FakeRunner(), logits, params, prompt, generated, rng) == expected
    np.testing.assert_array_equal(logits, before)


def test_penalties_shift_frequencies(logits) -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    random = np.random.default_rng(2)
    generated = [3, 3, 5]
    counts = Counter(
        choose_token(FakeRunner(), logits, params, [], generated, random) for _ in range(20_000)
    )
    expected = softmax(np.asarray(penalized(logits, params, [], generated)))
    check_frequencies(counts, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("seed", -1),
        ("seed", 1.5),
        ("stop", ("x", "")),
    ],
)
def test_bad_values_are_refused_by_name(name, value) -> None:
    with pytest.raises(OptionError, match=name):
        SamplingParams(**{name: value})
    with pytest.raises(OptionError, match=name):
        SamplingParams().with_changes(**{name: value})


def test_defaults_come_from_the_model() -> None:
    config = ChatConfig(
        model_type="llama",
        quantization="q4f16_1",
        model_config={},
        vocab_size=10,
        context_window_size=16,
        prefill_chunk_size=16,
        conv_template={},
        temperature=0.6,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
    )
    assert SamplingParams.from_config(config) == SamplingParams(0.6, 0.9, 0.2, 0.1, 1.1)
