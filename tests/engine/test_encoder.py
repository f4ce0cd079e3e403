"""The encoder: inputs share steps and pages, and no input changes what another becomes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fakes import FakeEncodingRunner, hidden_state

from mlc_llm.engine.encoder import Encoder, Pooling, pages_for_encoding, read_pooling
from mlc_llm.errors import UnsupportedModel


def make_encoder(
    pooling: Pooling = "last", is_causal: bool = True, **changes: int
) -> tuple[Encoder, FakeEncodingRunner]:
    runner = FakeEncodingRunner(num_pages=1, **changes)
    runner = FakeEncodingRunner(num_pages=pages_for_encoding(runner.metadata), **changes)
    return Encoder(runner, pooling=pooling, is_causal=is_causal), runner


def pooled(tokens: list[int], pooling: str) -> np.ndarray:
    """Return what the fake model's states make, each of which depends on all tokens before it."""
    if pooling == "last":
        return hidden_state(tokens)
    if pooling == "cls":
        return hidden_state(tokens[:1])
    states = [hidden_state(tokens[: n + 1]) for n in range(len(tokens))]
    return np.mean(states, axis=0, dtype=np.float64).astype(np.float32)


def test_short_inputs_share_a_step() -> None:
    encoder, runner = make_encoder(prefill_chunk_size=32)
    inputs = [[5, 6, 7], [8], [9] * 10]
    np.testing.assert_array_equal(encoder.encode(inputs), [hidden_state(i) for i in inputs])
    assert runner.step_sizes == [14]


def test_a_long_input_takes_several_steps() -> None:
    encoder, runner = make_encoder(prefill_chunk_size=8)
    inputs = [[3], list(range(60)), [4, 4]]
    np.testing.assert_array_equal(encoder.encode(inputs), [hidden_state(i) for i in inputs])
    assert runner.step_sizes == [8] * 7 + [7]


def test_a_step_has_no_more_inputs_than_the_library_takes() -> None:
    encoder, runner = make_encoder(prefill_chunk_size=32, max_batch_size=4)
    inputs = [[token] for token in range(10)]
    np.testing.assert_array_equal(encoder.encode(inputs), [hidden_state(i) for i in inputs])
    assert runner.step_sizes == [4, 4, 2]


@pytest.mark.parametrize("seed", range(20))
def test_random_inputs(seed: int) -> None:
    draw = random.Random(seed)
    chunk, batch = draw.randint(1, 40), draw.randint(1, 6)
    encoder, runner = make_encoder(prefill_chunk_size=chunk, max_batch_size=batch)
    for _ in range(3):
        lengths = [draw.choice([1, 2, 15, 16, 17, 63, 64]) for _ in range(draw.randint(1, 12))]
        inputs = [[draw.randrange(512) for _ in range(length)] for length in lengths]
        np.testing.assert_array_equal(encoder.encode(inputs), [hidden_state(i) for i in inputs])
        encoder.check_integrity()
    assert max(runner.step_sizes) <= chunk


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_pooling(pooling: Pooling, is_causal: bool) -> None:
    draw = random.Random(5)
    encoder, runner = make_encoder(pooling, is_causal, prefill_chunk_size=24, max_batch_size=3)
    assert encoder.max_input_len == (64 if is_causal else 24)
    for _ in range(10):
        longest = encoder.max_input_len
        lengths = [draw.choice([1, 2, 15, 16, 17, longest]) for _ in range(draw.randint(1, 12))]
        inputs = [[draw.randrange(512) for _ in range(length)] for length in lengths]
        found = encoder.encode(inputs)
        expected = np.asarray([pooled(tokens, pooling) for tokens in inputs])
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        # To the bit, whatever else is in the request.
        np.testing.assert_array_equal(found, [encoder.encode([tokens])[0] for tokens in inputs])
        encoder.check_integrity()
    assert max(runner.step_sizes) <= 24


def test_inputs_of_a_model_that_looks_ahead_are_not_cut() -> None:
    encoder, runner = make_encoder("mean", False, prefill_chunk_size=16)
    encoder.encode([[1] * 10, [2] * 10, [3] * 6, [4] * 16, [5]])
    assert runner.step_sizes == [10, 16, 16, 1]
    starts = [step.positions[step.query_start[:-1]].tolist() for step in runner.steps]
    assert starts == [[0], [0, 0], [0], [0]]


def test_an_unknown_pooling_is_refused() -> None:
    assert read_pooling("mean") == "mean"
    with pytest.raises(UnsupportedModel, match="'max'; this release pools by cls, mean, last"):
        read_pooling("max")


def test_a_failed_step_gives_its_pages_back() -> None:
    encoder, runner = make_encoder(prefill_chunk_size=8)
    runner.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        encoder.encode([[1] * 20, [2]])
    encoder.check_integrity()
    np.testing.assert_array_equal(encoder.encode([[1, 2]]), [hidden_state([1, 2])])


def test_the_caller_can_end_it_between_steps() -> None:
    encoder, runner = make_encoder(prefill_chunk_size=8)

    def after_two() -> None:
        if len(runner.steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder.encode([[1] * 40], after_two)
    assert len(runner.steps) == 2
    encoder.check_integrity()


def test_close_frees_the_runner() -> None:
    encoder, runner = make_encoder()
    encoder.close()
    assert runner.is_closed
