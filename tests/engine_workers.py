"""Engines of the fake runner in their thread, for tests of what happens around it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fakes import FakeRunner

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.stream import RequestStream
from mlc_llm.engine.worker import EngineWorker

GREEDY = SamplingParams(temperature=0.0)
LONG = 400


class SlowRunner(FakeRunner):
    """Takes some time for each step, and waits while `gate` is closed."""

    def __init__(self, step_s: float = 0.0, **changes: Any) -> None:
        super().__init__(**changes)
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0

    def forward(self, step):
        self.num_steps += 1
        assert self.gate.wait(20)
        if self.step_s:
            time.sleep(self.step_s)
        return super().forward(step)


def make_engine(step_s: float = 0.0, num_pages: int = 128, **changes: Any) -> Engine:
    values = {"context_window_size": 512, "prefill_chunk_size": 64, "max_batch_size": 4}
    return Engine(SlowRunner(step_s, num_pages=num_pages, **{**values, **changes}))


def runner_of(engine: Engine) -> SlowRunner:
    runner = engine._runner
    assert isinstance(runner, SlowRunner)
    return runner


def ask(name: str = "r", count: int | None = 8, prompt: list[int] | None = None, **changes: Any):
    return Request(name, prompt or [5, 6, 7], GREEDY.with_changes(max_tokens=count), **changes)


@contextlib.contextmanager
def running(engine: Any, **options: Any) -> Iterator[EngineWorker]:
    """A started worker; when it is left, its thread ends and the engine is sound and empty."""
    worker = EngineWorker(engine, **options)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        assert worker._thread is not None and not worker._thread.is_alive()
        assert worker.num_requests == 0
        if isinstance(engine, Engine):
            engine.check_integrity()
            assert engine.load().num_used_pages == 0


async def read(stream: RequestStream) -> list[Output]:
    """Return all outputs of a stream."""
    return [output for outputs in [batch async for batch in stream] for output in outputs]


def tokens_of(outputs: list[Output], index: int = 0) -> list[int]:
    return [o.token_id for o in outputs if o.index == index and o.token_id is not None]


async def until(is_so: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)


def is_idle(worker: EngineWorker) -> bool:
    return worker.num_requests == 0 and worker.engine.load().num_used_pages == 0
