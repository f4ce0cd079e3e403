"""The encoder: inputs share steps and pages, and no input changes what another becomes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fakes import FakeEncodingRunner, hidden_state

from mlc_llm.engine.encoder import Encoder, pages_for_encoding


def make_encoder(**changes: int) -> tuple[Encoder, FakeEncodingRunner]:
    runner = FakeEncodingRunner(num_pages=1, **changes)
    runner = FakeEncodingRunner(num_pages=pages_for_encoding(runner.metadata), **changes)
    return Encoder(runner), runner


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
