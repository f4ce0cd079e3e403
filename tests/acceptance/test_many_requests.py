"""Sixty-four unlike requests at once give each the answer it gets when it is alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from demo_model import open_demo_model
from program import Program

from mlc_llm.engine.config import EngineConfig
from mlc_llm.engine.open import OpenModel
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.text.stream import TextStream
from mlc_llm.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

NUM_REQUESTS = 64
MAX_PROMPT_LEN = 1500
# As many tokens of answer a request may want where pages are scarce.
LONG_ANSWER = 160
LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
STOPS = (" the", ".", "\n", " of", "e ", "License")


@dataclass(frozen=True)
class Case:
    """What is asked; how long after the one before; how many tokens to read before leaving."""

    request: Request
    wait_s: float
    leave_after: int | None


@dataclass
class Answer:
    """The tokens and the text of one sequence, and why it ended."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None


def make_cases(
    rng: random.Random, model: OpenModel, lengths: list[int], max_answer: int
) -> list[Case]:
    """Return requests of some lengths: text and noise, shared beginnings, all that may be set."""
    text = model.tokenizer.encode(LICENSE.read_text(encoding="utf-8"))
    assert len(text) > max(lengths)
    cases = []
    for number, length in enumerate(lengths):
        start = rng.choice([0, 0, rng.randrange(len(text) - length)])
        prompt = text[start : start + length]
        if rng.random() < 0.2:
            prompt = [rng.randrange(3, 49_000) for _ in range(length)]
        max_tokens = rng.randrange(1, max_answer + 1)
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
            top_k=rng.choice([0, 0, 40]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            presence_penalty=rng.choice([0.0, 0.0, 0.4]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logit_bias=rng.choice([{}, {}, {text[5]: 4.0, text[9]: -100.0}]),
            logprobs=rng.choice([None, None, 0, 3]),
            min_tokens=rng.choice([0, 0, min(4, max_tokens)]),
            max_tokens=max_tokens,
            seed=rng.randrange(-5, 1 << 40),
            stop=tuple(rng.sample(STOPS, rng.choice([0, 0, 0, 1, 2]))),
        )
        further_stops = rng.sample(range(3, 2000), rng.choice([0, 0, 400]))
        request = Request(
            f"request {number}",
            prompt,
            params,
            n=rng.choice([1, 1, 2, 3]),
            stop_token_ids=model.prompts.stop_token_ids.union(further_stops),
            priority=rng.choice([0, 0, 0, -1, 1]),
            cache_salt=rng.choice(["", "", "a", "b"]),
        )
        leave_after = rng.randrange(0, 20) if rng.random() < 0.2 else None
        cases.append(Case(request, rng.expovariate(1 / 0.05), leave_after))
    return cases


async def read(worker: EngineWorker, case: Case, tokenizer: Tokenizer) -> list[Answer]:
    """Ask, and read to the end or to where the case leaves."""
    request = case.request
    answers = [Answer() for _ in range(request.n)]
    texts = [TextStream(tokenizer, request.params.stop, request.params.min_tokens) for _ in answers]
    num_read = 0
    async with await worker.submit(request) as stream:
        if case.leave_after == 0:
            return answers
        async for outputs in stream:
            for output in outputs:
                assert output.error is None
                answer, text = answers[output.index], texts[output.index]
                if text.stopped:
                    continue
                if output.token_id is not None:
                    answer.tokens.append(output.token_id)
                    answer.text += text.put(output.token_id)
                    num_read += 1
                if text.stopped:
                    answer.reason = "stop"
                elif output.finish_reason is not None:
                    answer.text += text.finish()
                    answer.reason = output.finish_reason
                if num_read == case.leave_after:
                    return answers
            if all(text.stopped for text in texts):
                stream.abort("stop")
    return answers


async def ask_together(
    worker: EngineWorker, cases: list[Case], tokenizer: Tokenizer
) -> list[list[Answer]]:
    """Let the requests arrive one after another without waiting for answers."""
    tasks = []
    for case in cases:
        await asyncio.sleep(case.wait_s)
        tasks.append(asyncio.create_task(read(worker, case, tokenizer)))
    return await asyncio.gather(*tasks)


async def ask_alone(
    worker: EngineWorker, cases: list[Case], tokenizer: Tokenizer
) -> list[list[Answer]]:
    """Ask one after another; no request finds anything of those before it."""
    answers = []
    for case in cases:
        await worker.run(lambda engine: engine.reset_prefix_cache())
        answers.append(await read(worker, Case(case.request, 0, None), tokenizer))
    return answers


@pytest.fixture
def open_model(program: Program, demo_gguf: Path) -> Iterator[Callable[..., OpenModel]]:
    """Open the demo model for sixteen sequences; it is closed at the end."""
    opened: list[OpenModel] = []

    def open_with(**limits: int) -> OpenModel:
        config = EngineConfig(mode="server", max_num_sequence=16, **limits)
        opened.append(open_demo_model(program, demo_gguf, config))
        return opened[-1]

    yield open_with
    for model in opened:
        model.close()


def at_once(case: Case) -> Case:
    """Return the case without its wait, and with answers long enough to need many pages."""
    min_tokens = LONG_ANSWER // 2
    max_tokens = max(case.request.params.max_tokens or 0, min_tokens)
    params = replace(case.request.params, min_tokens=min_tokens, max_tokens=max_tokens)
    return Case(replace(case.request, params=params), 0, case.leave_after)


def run(model: OpenModel, action: Callable[[EngineWorker], Awaitable[None]]) -> None:
    """Run an action with a worker; afterwards nothing is in use."""

    async def with_worker() -> None:
        worker = EngineWorker(model.engine)
        worker.start()
        try:
            await action(worker)
            assert await worker.drain(10)
        finally:
            worker.stop()

    assert model.engine.load().num_used_pages == 0
    asyncio.run(with_worker())
    model.engine.check_integrity()
    load = model.engine.load()
    assert (load.num_running, load.num_waiting, load.num_used_pages) == (0, 0, 0)


def assert_same(cases: list[Case], together: list[list[Answer]], alone: list[list[Answer]]) -> None:
    """Check every answer, and of those left early what was read."""
    for case, found, wanted in zip(cases, together, alone, strict=True):
        if case.leave_after is None:
            assert found == wanted, case.request.request_id
            assert all(answer.reason in ("stop", "length") for answer in found)
            continue
        for answer, whole in zip(found, wanted, strict=True):
            assert answer.tokens == whole.tokens[: len(answer.tokens)], case.request.request_id


def test_together_is_alone(open_model: Callable[..., OpenModel]) -> None:
    model, rng = open_model(), random.Random(1)
    lengths = [1, 2, 15, 16, 17, 32, MAX_PROMPT_LEN - 1, MAX_PROMPT_LEN]
    while len(lengths) < NUM_REQUESTS:
        lengths.append(int(min(MAX_PROMPT_LEN, max(1, rng.lognormvariate(4.5, 1.3)))))
    rng.shuffle(lengths)
    cases = make_cases(rng, model, lengths, 48)
    together: list[list[Answer]] = []
    alone: list[list[Answer]] = []

    async def ask(worker: EngineWorker) -> None:
        together.extend(await ask_together(worker, cases, model.tokenizer))
        assert worker.metrics.cached_tokens > 0
        assert worker.metrics.requests["abort"] >= 8
        alone.extend(await ask_alone(worker, cases, model.tokenizer))

    run(model, ask)
    assert_same(cases, together, alone)
    reasons = [answer.reason for answers in alone for answer in answers]
    assert min(reasons.count("stop"), reasons.count("length")) >= 16


def test_answers_are_the_same_when_pages_run_out(open_model: Callable[..., OpenModel]) -> None:
    """Some lose their pages in the middle, and compute their tokens again."""
    model, rng = open_model(max_total_sequence_length=512), random.Random(2)
    lengths = [rng.randrange(10, 100) for _ in range(12)]
    cases = [at_once(case) for case in make_cases(rng, model, lengths, LONG_ANSWER)]
    together: list[list[Answer]] = []
    alone: list[list[Answer]] = []

    async def ask(worker: EngineWorker) -> None:
        together.extend(await ask_together(worker, cases, model.tokenizer))
        assert worker.metrics.num_preemptions > 0
        alone.extend(await ask_alone(worker, cases, model.tokenizer))

    run(model, ask)
    assert_same(cases, together, alone)
