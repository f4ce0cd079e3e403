"""Generation on the fake runner: prefix reuse, chunks, endings, and what survives a failure."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from fakes import VOCAB_SIZE, FakeRunner, continuation, next_token, only

from mlc_llm.engine.scheduler import Scheduler
from mlc_llm.engine.session import ChatSession, SamplingParams
from mlc_llm.errors import ContextTooLong, RequestError, StepFailed

GREEDY = SamplingParams(temperature=0.0)
PROMPT = list(range(10, 30))


def greedy(count: int, **changes: object) -> SamplingParams:
    return GREEDY.with_changes(max_tokens=count, **changes)


def check_pages(session: ChatSession) -> None:
    session._engine.check_integrity()
    assert session._engine.load().num_used_pages == 0


def test_tokens_follow_from_the_whole_sequence(open_session) -> None:
    session = open_session(FakeRunner())
    assert list(session.generate(PROMPT, greedy(30))) == continuation(PROMPT, 30)
    check_pages(session)


@pytest.mark.parametrize("chunk", [1, 7, 8, 19, 20, 64])
def test_prompt_is_brought_in_chunks(open_session, chunk) -> None:
    runner = FakeRunner(prefill_chunk_size=chunk)
    session = open_session(runner)
    assert list(session.generate(PROMPT, greedy(3))) == continuation(PROMPT, 3)
    prefill = -(-len(PROMPT) // chunk)
    assert sum(runner.step_sizes[:prefill]) == len(PROMPT)
    assert max(runner.step_sizes[:prefill]) <= chunk
    # The last token is not fed: nobody asks what comes after it.
    assert runner.step_sizes[prefill:] == [1, 1]
    assert all(step.logit_rows.tolist() == [len(step.token_ids) - 1] for step in runner.steps)


def test_turns_reuse_what_they_share(open_session) -> None:
    runner = FakeRunner()
    session = open_session(runner)
    answer = list(session.generate(PROMPT, greedy(5)))
    assert session.last.cached_tokens == 0
    longer = [*PROMPT, *answer, 40, 41]
    runner.steps.clear()
    assert list(session.generate(longer, greedy(5))) == continuation(longer, 5)
    # Whole pages are shared.
    assert session.last.cached_tokens == 16
    assert session.last.prompt_tokens == len(longer)
    assert sum(runner.step_sizes) == len(longer) - 16 + 4
    other = [*PROMPT[:4], 99, 98]
    assert list(session.generate(other, greedy(2))) == continuation(other, 2)
    assert session.last.cached_tokens == 0
    check_pages(session)


def test_same_prompt_computes_its_last_token_again(open_session) -> None:
    session = open_session(FakeRunner())
    first = list(session.generate(PROMPT, greedy(4)))
    assert list(session.generate(PROMPT, greedy(4))) == first
    assert session.last.cached_tokens == 16
    whole_pages = list(range(40, 72))[:32]
    for cached in (0, 16):
        list(session.generate(whole_pages, greedy(1)))
        assert session.last.cached_tokens == cached
    assert list(session.generate([5], greedy(1))) == continuation([5], 1)
    assert session.last.cached_tokens == 0


def test_random_turns_equal_fresh_sessions(open_session) -> None:
    rng = np.random.default_rng(3)
    session = open_session(FakeRunner())
    history: list[int] = PROMPT[:5]
    for _ in range(60):
        keep = int(rng.integers(0, len(history) + 1))
        prompt = [*history[:keep], *rng.integers(3, 6, rng.integers(1, 9)).tolist()][:50]
        count = int(rng.integers(1, 9))
        answer = list(session.generate(prompt, greedy(count)))
        assert answer == continuation(prompt, count)
        check_pages(session)
        history = prompt + answer


def test_stop_token_ends_and_is_not_said(open_session) -> None:
    script = [20, 21, 2, 22, 23]
    runner = FakeRunner(lambda tokens: only(script[max(0, len(tokens) - len(PROMPT))]))
    session = open_session(runner)
    assert list(session.generate(PROMPT, GREEDY)) == [20, 21]
    assert session.last.finish_reason == "stop"
    assert session.last.completion_tokens == 2
    ignoring = greedy(5, ignore_eos=True)
    assert list(session.generate(PROMPT, ignoring)) == script
    assert session.last.finish_reason == "length"


def test_stop_token_may_come_first(open_session) -> None:
    session = open_session(FakeRunner(lambda _: only(2)))
    assert list(session.generate(PROMPT, GREEDY)) == []
    assert (session.last.finish_reason, session.last.completion_tokens) == ("stop", 0)
    assert session.last.prefill_s > 0 and session.last.decode_tokens_per_s is None


def test_max_tokens(open_session) -> None:
    session = open_session(FakeRunner())
    assert len(list(session.generate(PROMPT, greedy(1)))) == 1
    assert session.last.finish_reason == "length"


@pytest.mark.parametrize("prompt_len", [1, 40, 63])
def test_answer_ends_with_the_context(open_session, prompt_len) -> None:
    runner = FakeRunner()
    session = open_session(runner)
    prompt = list(range(3, 3 + prompt_len))
    answer = list(session.generate(prompt, GREEDY))
    assert answer == continuation(prompt, 64 - prompt_len)
    assert session.last.finish_reason == "length"
    check_pages(session)


def test_prompt_without_room_is_refused_and_nothing_is_lost(open_session) -> None:
    runner = FakeRunner()
    session = open_session(runner)
    list(session.generate(PROMPT, greedy(2)))
    before = len(runner.steps)
    with pytest.raises(ContextTooLong, match=r"64 tokens, .*64.*shorten it"):
        session.generate([5] * 64, GREEDY)
    assert len(runner.steps) == before
    list(session.generate(PROMPT, greedy(2)))
    assert session.last.cached_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([3, -1], "-1"), ([3, VOCAB_SIZE], str(VOCAB_SIZE))],
)
def test_bad_tokens_are_refused(open_session, prompt, message) -> None:
    runner = FakeRunner()
    with pytest.raises(RequestError, match=message):
        open_session(runner).generate(prompt, GREEDY)
    assert runner.steps == []


def test_abandoned_answer_leaves_the_session_usable(open_session) -> None:
    session = open_session(FakeRunner())
    for count in (0, 1, 7):
        tokens = session.generate(PROMPT, GREEDY)
        assert list(itertools.islice(tokens, count)) == continuation(PROMPT, count)
        tokens.close()
        if count:
            assert session.last.finish_reason == "abort"
            assert session.last.completion_tokens == count
        check_pages(session)
        assert list(session.generate(PROMPT, greedy(9))) == continuation(PROMPT, 9)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing_step", [0, 1, 2, 4])
def test_failing_step_leaves_the_session_usable(open_session, error, failing_step) -> None:
    runner = FakeRunner()
    session = open_session(runner)
    list(session.generate(PROMPT[:3], greedy(2)))
    runner.steps.clear()

    def fail_in_time(tokens: list[int]) -> np.ndarray:
        if len(runner.steps) == failing_step:
            runner.error = error
        return only(next_token(tokens))

    runner.logits_of = fail_in_time
    if failing_step == 0:
        runner.error = error
    expected = StepFailed if isinstance(error, Exception) else type(error)
    with pytest.raises(expected):
        list(session.generate(PROMPT, greedy(9)))
    assert len(runner.steps) == failing_step + 1
    check_pages(session)
    runner.logits_of = lambda tokens: only(next_token(tokens))
    assert list(session.generate(PROMPT, greedy(9))) == continuation(PROMPT, 9)


def test_interrupt_before_the_step_runs_loses_no_page(open_session, monkeypatch) -> None:
    session = open_session(FakeRunner())
    schedule = Scheduler.schedule

    def interrupted(self: Scheduler, budget: Callable[[int, int], int]) -> None:
        schedule(self, budget)
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "schedule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.generate(PROMPT, greedy(3)))
    monkeypatch.undo()
    check_pages(session)
    assert list(session.generate(PROMPT, greedy(3))) == continuation(PROMPT, 3)


def test_padding_of_the_vocabulary_is_never_chosen(open_session) -> None:
    logits = only(400) + only(300) / 2
    session = open_session(FakeRunner(lambda _: logits), active_vocab_size=350)
    assert list(session.generate(PROMPT, greedy(2))) == [300, 300]
    params = SamplingParams(temperature=100.0, max_tokens=40, seed=1, ignore_eos=True)
    assert max(session.generate(PROMPT, params)) < 350


def test_same_seed_same_answer(open_session) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, VOCAB_SIZE)).astype(np.float32)
    session = open_session(FakeRunner(lambda tokens: logits[len(tokens)]))

    def answer(seed: int | None) -> list[int]:
        params = SamplingParams(seed=seed, max_tokens=20, ignore_eos=True)
        return list(session.generate(PROMPT, params))

    assert answer(5) == answer(5)
    assert answer(5) != answer(6)
    assert len({tuple(answer(None)) for _ in range(3)}) == 3


def test_penalties_see_the_prompt_and_the_answer(open_session) -> None:
    flat = np.zeros(VOCAB_SIZE, np.float32)
    flat[50:55] = [5.0, 4.9, 4.8, 4.7, 4.6]
    session = open_session(FakeRunner(lambda _: flat))
    assert list(session.generate(PROMPT, greedy(4, presence_penalty=1.0))) == [50, 51, 52, 53]
    repetition = greedy(3, repetition_penalty=2.0)
    assert list(session.generate([*PROMPT, 50], repetition)) == [51, 52, 53]


def test_rates_and_counts(open_session) -> None:
    session = open_session(FakeRunner())
    list(session.generate(PROMPT, greedy(5)))
    stats = session.last
    assert (stats.prompt_tokens, stats.completion_tokens) == (20, 5)
    assert stats.prefill_tokens_per_s == pytest.approx(20 / stats.prefill_s)
    assert stats.decode_tokens_per_s == pytest.approx(4 / stats.decode_s)


def test_close_frees_the_runner(open_session) -> None:
    runner = FakeRunner()
    session = open_session(runner)
    assert session.context_window_size == 64
    session.close()
    assert runner.is_closed


def test_one_answer_at_a_time(open_session) -> None:
    session = open_session(FakeRunner())
    first = session.generate(PROMPT, greedy(5))
    next(first)
    with pytest.raises(RequestError, match="still answering"):
        next(session.generate(PROMPT[:3], greedy(5)))
    assert [*first] == continuation(PROMPT, 5)[1:]
    assert list(session.generate(PROMPT[:3], greedy(5))) == continuation(PROMPT[:3], 5)
    check_pages(session)
