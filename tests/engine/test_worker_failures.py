"""Steps that fail, engines that die, stopping and draining."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import pytest
from engine_workers import (
    LONG,
    ask,
    make_engine,
    read,
    runner_of,
    running,
    until,
)

from mlc_llm.engine.grammar_cache import CompiledGrammar
from mlc_llm.engine.metrics import EngineMetrics, RequestStats
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.errors import (
    EngineStopped,
    MlcError,
    RequestError,
    StepFailed,
)


def test_a_failing_step_fails_its_requests_and_no_others() -> None:
    async def main() -> None:
        runner = runner_of(worker.engine)
        runner.gate.clear()
        failing = await worker.submit(ask("failing", n=2))
        await until(lambda: runner.num_steps == 1)
        runner.error = RuntimeError("out of luck")
        later = await worker.submit(ask("later"))
        runner.gate.set()
        assert errors_of(await read(failing)) == [(0, StepFailed), (1, StepFailed)]
        assert len(await read(later)) == 8
        assert len(await read(await worker.submit(ask("again")))) == 8
        assert worker.state == "running"

    with running(make_engine()) as worker:
        asyncio.run(main())


class BrokenEngine:
    """An engine whose steps raise what `errors` holds; otherwise each request gets a token."""

    max_num_sequence = 4

    def __init__(self, *errors: BaseException | None) -> None:
        self.metrics = EngineMetrics()
        self.errors = list(errors)
        self.requests: dict[str, Request] = {}
        self.add_error: Exception | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def check(self, request: Request) -> None:
        pass

    def add(self, request: Request, grammar: CompiledGrammar | None = None) -> RequestStats:
        if self.add_error is not None:
            raise self.add_error
        self.requests[request.request_id] = request
        return RequestStats()

    def abort(self, request_id: str, reason: str = "abort") -> None:
        self.requests.pop(request_id, None)

    def step(self) -> list[Output]:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        requests, self.requests = self.requests, {}
        return [Output(name, 0, 7, finish_reason="length") for name in requests]


def errors_of(outputs: list[Output]) -> list[tuple[int, type[MlcError] | None]]:
    return [(output.index, type(output.error) if output.error else None) for output in outputs]


def test_an_engine_that_raises_is_given_another_chance() -> None:
    async def main() -> None:
        for name in ("a", "b"):
            outputs = await read(await worker.submit(ask(name, n=2)))
            assert errors_of(outputs) == [(0, StepFailed), (1, StepFailed)]
            assert "ValueError" in str(outputs[0].error)
        assert errors_of(await read(await worker.submit(ask("c")))) == [(0, None)]
        # That step counts: two more failures are not three in a row.
        for name in ("d", "e"):
            await read(await worker.submit(ask(name)))
        assert errors_of(await read(await worker.submit(ask("f")))) == [(0, None)]
        assert worker.state == "running" and worker.metrics.num_failed_steps == 4

    error = ValueError("x")
    with running(BrokenEngine(error, error, None, error, error)) as worker:
        asyncio.run(main())


class Exit(BaseException):
    """What no handler of exceptions expects."""


@pytest.mark.parametrize(
    "errors",
    [
        [ValueError("x")] * 3,
        [MemoryError("no room")],
        [SystemError("broken")],
        [Exit()],
    ],
)
def test_an_engine_that_cannot_go_on_is_dead(errors, caplog) -> None:
    async def main() -> None:
        for number in range(len(errors) - 1):
            await read(await worker.submit(ask(f"r{number}")))
        first, second = await worker.submit(ask("a", n=2)), await worker.submit(ask("b"))
        assert errors_of(await read(first)) == [(0, EngineStopped), (1, EngineStopped)]
        outputs = await read(second)
        assert errors_of(outputs) == [(0, EngineStopped)] and "died" in str(outputs[0].error)
        await until(lambda: worker.state == "dead")
        with pytest.raises(EngineStopped, match="the engine is dead"):
            await worker.submit(ask("c"))
        with pytest.raises(EngineStopped):
            await worker.run(lambda engine: 1)
        assert await worker.drain(0.1)

    engine = BrokenEngine(*errors)
    worker = EngineWorker(engine)  # type: ignore[arg-type]
    with running_to_the_end(engine, worker):
        asyncio.run(main())
    assert worker.state == "dead"
    assert "the engine has died" in caplog.text


@contextlib.contextmanager
def running_to_the_end(engine: BrokenEngine, worker: EngineWorker) -> Iterator[None]:
    """Run a worker whose engine meets its last error only when two requests are there."""
    original = engine.step

    def step() -> list[Output]:
        deadline = time.monotonic() + 10
        while len(engine.errors) == 1 and worker.num_requests < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return original()

    engine.step = step  # type: ignore[method-assign]
    worker.start()
    try:
        yield
    finally:
        worker.stop()


@pytest.mark.parametrize(
    ("error", "kind"), [(RequestError("no"), RequestError), (KeyError("x"), StepFailed)]
)
def test_a_request_the_engine_does_not_take(error, kind) -> None:
    async def main() -> None:
        worker.engine.add_error = error  # type: ignore[attr-defined]
        stream = await worker.submit(ask("a"))
        with pytest.raises(kind):
            await read(stream)
        worker.engine.add_error = None  # type: ignore[attr-defined]
        assert errors_of(await read(await worker.submit(ask("a")))) == [(0, None)]

    with running(BrokenEngine()) as worker:
        asyncio.run(main())


def test_stopping_tells_every_reader() -> None:
    async def main() -> None:
        streams = [await worker.submit(ask(f"r{i}", LONG, n=1 + i % 2)) for i in range(8)]
        await anext(streams[0])
        await asyncio.to_thread(worker.stop)
        for number, stream in enumerate(streams):
            ends = [o for o in await read(stream) if o.finish_reason is not None]
            assert [o.index for o in ends] == list(range(1 + number % 2))
            assert all(isinstance(o.error, EngineStopped) for o in ends)
        with pytest.raises(EngineStopped, match="stopped"):
            await worker.submit(ask("late"))
        assert worker.state == "stopped"

    with running(make_engine(0.002)) as worker:
        asyncio.run(main())
        worker.stop()  # again does nothing
        with pytest.raises(EngineStopped, match="make another"):
            worker.start()


def test_stopping_in_a_step_that_hangs(caplog) -> None:
    async def main() -> None:
        runner_of(worker.engine).gate.clear()
        stream = await worker.submit(ask())
        await until(lambda: runner_of(worker.engine).num_steps == 1)
        worker.stop(0.05)
        outputs = await asyncio.wait_for(read(stream), 5)
        assert errors_of(outputs) == [(0, EngineStopped)]
        runner_of(worker.engine).gate.set()

    engine = make_engine()
    worker = EngineWorker(engine)
    worker.start()
    asyncio.run(main())
    worker.stop()
    assert "does not end" in caplog.text and worker._thread is not None
    assert not worker._thread.is_alive()


def test_a_worker_that_was_never_started() -> None:
    worker = EngineWorker(make_engine())
    worker.stop()
    assert worker.state == "stopped" and not worker.is_stuck
    with pytest.raises(EngineStopped):
        asyncio.run(worker.submit(ask()))
    worker.start()
    assert worker.state == "running"
    worker.stop()


def test_draining_finishes_what_is_under_way() -> None:
    async def main() -> None:
        streams = [await worker.submit(ask(f"r{i}", 20)) for i in range(6)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        draining = asyncio.create_task(worker.drain(20))
        await asyncio.sleep(0)
        assert worker.state == "draining"
        with pytest.raises(EngineStopped, match="shutting down"):
            await worker.submit(ask("late"))
        assert await draining
        assert [len(outputs) for outputs in await asyncio.gather(*readers)] == [20] * 6

    with running(make_engine(0.002)) as worker:
        asyncio.run(main())


def test_draining_aborts_what_takes_too_long() -> None:
    async def main() -> None:
        short = await worker.submit(ask("short", 3))
        long = await worker.submit(ask("long", LONG))
        assert not await worker.drain(0.15)
        assert worker.num_requests == 0
        assert (await read(short))[-1].finish_reason == "length"
        assert (await read(long))[-1].finish_reason == "abort"

    with running(make_engine(0.005)) as worker:
        asyncio.run(main())


def test_actions_end_with_the_worker() -> None:
    async def main() -> None:
        runner_of(worker.engine).gate.clear()
        stream = await worker.submit(ask())
        await until(lambda: runner_of(worker.engine).num_steps == 1)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop))
        await until(lambda: worker.state == "stopped")
        with pytest.raises(EngineStopped):
            await worker.run(lambda engine: 1)
        runner_of(worker.engine).gate.set()
        await stopping
        assert errors_of(await read(stream))[-1] == (0, EngineStopped)

    async def late() -> None:
        runner_of(worker.engine).gate.clear()
        stream = await worker.submit(ask())
        await until(lambda: runner_of(worker.engine).num_steps == 1)
        worker._commands.put(None)  # the thread will stop before it comes to the action
        action = asyncio.create_task(worker.run(lambda engine: 1))
        await asyncio.sleep(0.01)
        runner_of(worker.engine).gate.set()
        with pytest.raises(EngineStopped):
            await asyncio.wait_for(action, 5)
        await read(stream)

    for scene in (main, late):
        with running(make_engine()) as worker:
            asyncio.run(scene())
