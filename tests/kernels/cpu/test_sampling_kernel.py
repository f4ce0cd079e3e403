"""Sampling against an exact nucleus by sorting, and against expected frequencies."""

import numpy as np
import pytest

from mlc_llm.kernels.cpu.sampling import sample

pytestmark = pytest.mark.cpu


class Sampler:
    def __init__(self, build):
        self.kernel = build(sample())

    def __call__(self, logits, uniform, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0):
        logits = np.asarray(logits, np.float32)
        rows = len(logits)

        def spread(value, dtype):
            return np.full(rows, value, dtype)

        return self.kernel(
            logits,
            spread(temperature, np.float32),
            spread(top_p, np.float32),
            spread(min_p, np.float32),
            spread(top_k, np.int32),
            np.asarray(uniform, np.float64),
            shape=(rows,),
            dtype="int32",
        )


@pytest.fixture
def sampler(build):
    return Sampler(build)


def kept(logits, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0):
    """Return weights in vocabulary order, zero for tokens that are left out."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = np.argsort(-weights, kind="stable")
    mask = weights >= min_p
    if top_k:
        mask &= weights >= weights[order[min(top_k, len(order)) - 1]]
    if top_p < 1:
        sums = np.cumsum(weights[order] * mask[order])
        last = order[np.searchsorted(sums, top_p * sums[-1])]
        mask &= weights >= weights[last]
    return weights * mask


@pytest.mark.parametrize("vocab", [1, 5, 16, 131, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.4},
        {"top_p": 0.7},
        {"top_k": 3},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    ],
)
def test_follows_the_distribution(sampler, rng, vocab, settings):
    logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
    weights = kept(logits, **settings)
    sums = np.cumsum(weights)
    uniform = (np.arange(200) + 0.5) / 200
    expected = np.searchsorted(sums, uniform * sums[-1], side="right")
    found = sampler(np.tile(logits, (200, 1)), uniform, **settings)
    # A draw at the border of two tokens may round to either.
    assert np.mean(found != expected) < 0.02
    assert np.all(weights[found] > 0)


def test_greedy_takes_the_first_of_the_likeliest(sampler):
    logits = np.zeros((2, 37), np.float32)
    logits[0, [20, 30]] = 4
    logits[1, 36] = 1
    assert sampler(logits, [0.9, 0.1], temperature=0.0).tolist() == [20, 36]


def test_rows_have_their_own_settings(build, rng):
    kernel = build(sample())
    logits = np.tile(np.asarray([0, 1, 2, 3], np.float32), (3, 1))
    found = kernel(
        logits,
        np.asarray([0, 1, 1], np.float32),
        np.asarray([1, 0.01, 1], np.float32),
        np.zeros(3, np.float32),
        np.zeros(3, np.int32),
        np.asarray([0.5, 0.999, 0.0]),
        shape=(3,),
        dtype="int32",
    )
    assert found.tolist() == [3, 3, 0]
