"""The step loop: requests that are refused, steps and rows that fail."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engines import (
    Collector,
    ask,
    make_engine,
    prompt_of,
    run,
    runner_of,
)
from fakes import VOCAB_SIZE, continuation, next_token, only

from mlc_llm.engine.request import Request
from mlc_llm.errors import ContextTooLong, RequestError, StepFailed


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask("r", []), RequestError, "empty"),
        (ask("r", [3, -1]), RequestError, "token -1 is outside"),
        (ask("r", [VOCAB_SIZE]), RequestError, f"token {VOCAB_SIZE} is outside"),
        (ask("r", [3] * 512), ContextTooLong, "512 tokens.*shorten"),
        (ask("r", [3], n=0), RequestError, "n must be"),
    ],
)
def test_bad_requests_are_refused(request_: Request, error: type, message: str) -> None:
    engine = make_engine()
    with pytest.raises(error, match=message):
        engine.add(request_)
    assert not engine.has_work


def test_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add(ask("a", [5]))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add(ask("a", [6]))
    assert run(engine).tokens["a", 0] == continuation([5], 8)


def test_failed_step_fails_its_requests_alone() -> None:
    engine = make_engine(max_num_sequence=2)
    for name in ("a", "b", "waits"):
        engine.add(ask(name, prompt_of(20), 10))
    said = Collector()
    said.take(engine.step())
    runner_of(engine).error = RuntimeError("secret path /tmp/x")
    said.take(engine.step())
    engine.check_integrity()
    for name in ("a", "b"):
        error = said.ends[name, 0].error
        assert isinstance(error, StepFailed) and "secret" not in str(error)
    assert engine.load().num_used_pages == 0
    while engine.has_work:
        said.take(engine.step())
    assert said.tokens["waits", 0] == continuation(prompt_of(20), 10)


def test_engine_that_only_fails_says_so() -> None:
    engine = make_engine()

    def fail(tokens: list[int]) -> np.ndarray:
        raise RuntimeError("broken for good")

    runner_of(engine).logits_of = fail
    for number in range(2):
        engine.add(ask(f"r{number}", prompt_of(5)))
        assert [output.finish_reason for output in engine.step()] == ["error"]
    engine.add(ask("last", prompt_of(5)))
    with pytest.raises(RuntimeError, match="for good"):
        engine.step()
    engine.check_integrity()
    runner_of(engine).logits_of = lambda tokens: only(next_token(tokens))
    assert run(engine, ask("again", prompt_of(5))).tokens["again", 0] == continuation(
        prompt_of(5), 8
    )


def test_row_that_cannot_be_sampled_fails_alone() -> None:
    engine = make_engine()
    bad = prompt_of(20, 1)

    def logits_of(tokens: list[int]) -> np.ndarray:
        if tokens[:20] == bad and len(tokens) == 23:
            return np.full(VOCAB_SIZE, np.nan, np.float32)
        return only(next_token(tokens))

    runner_of(engine).logits_of = logits_of
    said = run(engine, ask("good", prompt_of(20)), ask("bad", bad))
    assert said.tokens["good", 0] == continuation(prompt_of(20), 8)
    assert said.ends["bad", 0].finish_reason == "error"
    assert said.tokens["bad", 0] == continuation(bad, 3)
