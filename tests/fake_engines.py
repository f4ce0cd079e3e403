"""Engines of the fake runner that run in the test's own thread."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from fakes import VOCAB_SIZE, FakeRunner

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def make_engine(num_pages: int = 64, **changes: Any) -> Engine:
    values: dict[str, Any] = {
        "context_window_size": 512,
        "prefill_chunk_size": 64,
        "max_batch_size": 8,
    }
    engine_keys = ("max_num_sequence", "has_prefix_cache", "max_idle_pages", "mixes_prompts")
    options = {key: changes.pop(key) for key in engine_keys if key in changes}
    runner = FakeRunner(num_pages=num_pages, **{**values, **changes})
    return Engine(runner, **options)


def runner_of(engine: Engine) -> FakeRunner:
    runner = engine._runner
    assert isinstance(runner, FakeRunner)
    return runner


def ask(name: str, prompt: list[int], count: int = 8, **changes: Any) -> Request:
    return Request(name, prompt, GREEDY.with_changes(max_tokens=count), **changes)


class Collector:
    """What an engine has said, by request and sequence."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ends: dict[tuple[str, int], Output] = {}

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in self.ends, "a sequence went on after its end"
            if output.token_id is not None:
                self.tokens[key].append(output.token_id)
            if output.finish_reason is not None:
                self.ends[key] = output
            assert (output.error is not None) == (output.finish_reason == "error")


def run(engine: Engine, *requests: Request, max_steps: int = 2000) -> Collector:
    collector = Collector()
    for request in requests:
        engine.add(request)
    for _ in range(max_steps):
        if not engine.has_work:
            break
        collector.take(engine.step())
        engine.check_integrity()
    assert not engine.has_work, "the engine does not come to an end"
    assert engine.load().num_used_pages == 0
    return collector


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
