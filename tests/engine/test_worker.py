"""The engine's thread: streams, ends of every kind, limits, failures and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import VOCAB_SIZE, FakeRunner, next_token

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar_cache import CompiledGrammar
from mlc_llm.engine.metrics import EngineMetrics, RequestStats
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.stream import RequestStream
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.errors import (
    ContextTooLong,
    EngineStopped,
    MlcError,
    QueueFull,
    RequestError,
    RequestTimeout,
    StepFailed,
)

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


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


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


def test_a_request_alone() -> None:
    async def main() -> None:
        before = time.perf_counter()
        stream = await worker.submit(ask(count=8))
        assert stream.request_id == "r"
        outputs = await read(stream)
        assert tokens_of(outputs) == continuation([5, 6, 7], 8)
        assert [o.finish_reason for o in outputs] == [None] * 7 + ["length"]
        assert stream.stats.completion_tokens == 8 and stream.stats.prompt_tokens == 3
        assert before <= stream.stats.arrival_s <= stream.stats.first_token_s
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    with running(make_engine()) as worker:
        asyncio.run(main())


def test_many_requests_at_once() -> None:
    async def one(number: int) -> None:
        prompt = [3 + number, 50, 3 + number % 7] * (1 + number % 20)
        stream = await worker.submit(ask(f"r{number}", 5 + number % 30, prompt, n=1 + number % 3))
        outputs = await read(stream)
        for index in range(1 + number % 3):
            assert tokens_of(outputs, index) == continuation(prompt, 5 + number % 30)

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(40)))

    with running(make_engine(max_batch_size=8)) as worker:
        asyncio.run(main())
        assert worker.metrics.requests["length"] == 40


def test_a_step_reaches_a_loop_by_one_call() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls = 0
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += threading.current_thread() is worker._thread
            return original(*args, **keywords)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        runner_of(worker.engine).gate.clear()
        streams = [await worker.submit(ask(f"r{i}", 30)) for i in range(4)]
        runner_of(worker.engine).gate.set()
        outputs = await asyncio.gather(*map(read, streams))
        assert [len(found) for found in outputs] == [30] * 4
        assert 30 <= calls <= runner_of(worker.engine).num_steps < 60

    with running(make_engine()) as worker:
        asyncio.run(main())


def test_a_reader_gets_all_that_has_arrived() -> None:
    async def main() -> None:
        stream = await worker.submit(ask(count=50))
        await until(lambda: stream._channel.is_over)
        batches = [batch async for batch in stream]
        assert [len(batch) for batch in batches] == [50]

    with running(make_engine()) as worker:
        asyncio.run(main())


def test_loops_of_several_threads() -> None:
    found: dict[int, list[int]] = {}

    async def main(number: int) -> None:
        stream = await worker.submit(ask(f"r{number}", 60, [number + 3]))
        found[number] = tokens_of(await read(stream))

    with running(make_engine()) as worker:
        threads = [
            threading.Thread(target=asyncio.run, args=(main(number),)) for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == {number: continuation([number + 3], 60) for number in range(4)}


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (ask(prompt=[5] * 512), ContextTooLong, "512 tokens"),
        (ask(prompt=[VOCAB_SIZE]), RequestError, "outside the vocabulary"),
        (Request("r", [], GREEDY), RequestError, "the prompt is empty"),
        (ask(n=0), RequestError, "n must be"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(request_, kind, words) -> None:
    with running(make_engine()) as worker, pytest.raises(kind, match=words):
        asyncio.run(worker.submit(request_))


def test_an_id_is_used_once_at_a_time() -> None:
    async def main() -> None:
        stream = await worker.submit(ask("same", LONG))
        with pytest.raises(RequestError, match="'same' is in use"):
            await worker.submit(ask("same"))
        stream.abort()
        await read(stream)
        assert len(await read(await worker.submit(ask("same")))) == 8

    with running(make_engine(0.001)) as worker:
        asyncio.run(main())


@pytest.mark.parametrize("reason", ["abort", "stop"])
def test_abort_from_anywhere(reason) -> None:
    async def main() -> None:
        stream = await worker.submit(ask("r", LONG, n=2))
        await anext(stream)
        threading.Thread(target=worker.abort, args=("r", reason)).start()
        outputs = await read(stream)
        ends = {o.index: o.finish_reason for o in outputs if o.finish_reason is not None}
        assert ends == {0: reason, 1: reason}
        assert len(outputs) < LONG
        assert worker.metrics.requests[reason] == 1
        worker.abort("r")
        worker.abort("never heard of")
        assert len(await read(await worker.submit(ask()))) == 8

    with running(make_engine(0.001)) as worker:
        asyncio.run(main())


def test_a_request_that_waits_can_be_aborted() -> None:
    async def main() -> None:
        runner_of(worker.engine).gate.clear()
        first = await worker.submit(ask("first", 20))
        second = await worker.submit(ask("second", 20))
        second.abort()
        runner_of(worker.engine).gate.set()
        assert [o.finish_reason for o in await read(second)] == ["abort"]
        assert len(await read(first)) == 20

    with running(make_engine(max_batch_size=1)) as worker:
        asyncio.run(main())


async def leave_by_close(stream: RequestStream) -> None:
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_by_block(stream: RequestStream) -> None:
    async with stream:
        async for _ in stream:
            break


async def leave_by_error(stream: RequestStream) -> None:
    with pytest.raises(ZeroDivisionError):
        async with stream:
            await anext(stream)
            raise ZeroDivisionError


async def leave_by_cancelling(stream: RequestStream) -> None:
    async def consume() -> None:
        async for _ in stream:
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_dropping(stream: RequestStream) -> None:
    async for _ in stream:
        break


@pytest.mark.parametrize(
    "leave",
    [leave_by_close, leave_by_block, leave_by_error, leave_by_cancelling, leave_by_dropping],
)
def test_leaving_frees_the_pages_within_a_step(leave) -> None:
    async def main() -> None:
        runner = runner_of(worker.engine)
        await leave(await worker.submit(ask("r", LONG, n=3)))
        gc.collect()
        num_steps = runner.num_steps
        await until(lambda: is_idle(worker))
        assert runner.num_steps <= num_steps + 2  # the one under way, and one that was beginning
        assert worker.metrics.requests["abort"] == 1

    with running(make_engine(0.005)) as worker:
        asyncio.run(main())


def test_leaving_ends_another_task_that_waits() -> None:
    async def main() -> None:
        runner_of(worker.engine).gate.clear()
        stream = await worker.submit(ask())
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="one reader"):
            await anext(stream)
        await stream.aclose()
        assert await asyncio.wait_for(reader, 5) == []
        runner_of(worker.engine).gate.set()
        await until(lambda: is_idle(worker))

    with running(make_engine()) as worker:
        asyncio.run(main())


def test_the_thread_sleeps_without_work() -> None:
    async def main() -> None:
        assert len(await read(await worker.submit(ask()))) == 8
        await until(lambda: is_idle(worker))
        looks = 0
        original = type(worker.engine).has_work

        def counted(self: Engine) -> bool:
            nonlocal looks
            looks += 1
            return original.fget(self)  # type: ignore[attr-defined,no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "has_work", property(counted))
            used_s = time.process_time()
            await asyncio.sleep(0.2)
            assert looks <= 2 and time.process_time() - used_s < 0.1
        assert len(await read(await worker.submit(ask("again")))) == 8

    with running(make_engine()) as worker:
        asyncio.run(main())


def test_the_queue_is_bounded() -> None:
    async def main() -> None:
        runner_of(worker.engine).gate.clear()
        streams = [await worker.submit(ask(f"r{i}")) for i in range(4 + 3)]
        for _ in range(2):
            with pytest.raises(QueueFull, match=r"7 requests .* max_queued_requests") as caught:
                await worker.submit(ask("one too many"))
            assert caught.value.retry_after_s == 5.0  # nothing has been served yet
        assert worker.metrics.num_rejections == 2
        runner_of(worker.engine).gate.set()
        outputs = await asyncio.gather(*map(read, streams))
        assert [len(found) for found in outputs] == [8] * 7
        assert len(await read(await worker.submit(ask("later")))) == 8

    with running(make_engine(), max_queued_requests=3) as worker:
        asyncio.run(main())


def test_no_queue_at_all() -> None:
    async def main() -> None:
        streams = [await worker.submit(ask(f"r{i}")) for i in range(4)]
        with pytest.raises(QueueFull):
            await worker.submit(ask("r4"))
        assert [len(found) for found in await asyncio.gather(*map(read, streams))] == [8] * 4

    with running(make_engine(0.01), max_queued_requests=0) as worker:
        asyncio.run(main())


@pytest.mark.parametrize(
    ("ends", "num_waiting", "expected"),
    [
        ([], 10, 5.0),
        ([-1.0], 10, 5.0),
        ([-4.0, -2.0], 10, 10.0),  # one in 2 s, half of 10
        ([-4.0, -3.0, -2.0, -1.0], 10, 5.0),
        ([-0.2, -0.1], 2, 1.0),  # never less than a second
        ([-50.0, -1.0], 500, 60.0),  # nor more than a minute
        ([-4000.0, -3999.0], 10, 5.0),  # an hour ago says nothing
    ],
)
def test_when_to_try_again(monkeypatch, ends, num_waiting, expected) -> None:
    worker = EngineWorker(make_engine())
    monkeypatch.setattr(time, "monotonic", lambda: 10_000.0)
    worker._end_times.extend(10_000.0 + end for end in ends)
    worker._live = dict.fromkeys(map(str, range(4 + num_waiting)))  # type: ignore[arg-type]
    assert worker._seconds_until_room() == pytest.approx(expected)


@pytest.mark.parametrize("is_default", [True, False])
def test_a_request_has_its_time(is_default) -> None:
    async def main() -> None:
        stream = await worker.submit(ask("r", LONG), None if is_default else 0.1)
        start = time.monotonic()
        outputs = []
        with pytest.raises(RequestTimeout, match=r"longer than 0\.1 s"):
            async for batch in stream:
                outputs += batch
        assert 0.05 < time.monotonic() - start < 5
        assert tokens_of(outputs) == continuation([5, 6, 7], len(outputs)) != []
        await until(lambda: is_idle(worker))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    with running(make_engine(0.005), request_timeout_s=0.1 if is_default else 60) as worker:
        asyncio.run(main())


def test_time_runs_even_in_a_step_that_hangs() -> None:
    async def main() -> None:
        runner_of(worker.engine).gate.clear()
        stream = await worker.submit(ask(), 0.05)
        with pytest.raises(RequestTimeout):
            await asyncio.wait_for(read(stream), 5)
        assert not worker.is_stuck
        await until(lambda: worker.is_stuck)
        runner_of(worker.engine).gate.set()
        await until(lambda: is_idle(worker) and not worker.is_stuck)
        assert worker.state == "running"

    with running(make_engine(), stuck_after_s=0.2) as worker:
        asyncio.run(main())


def test_timers_of_finished_requests_do_not_stay() -> None:
    async def main() -> None:
        stream = await worker.submit(ask(), 60)
        timer = stream._channel.timer
        assert timer is not None and not timer.cancelled()
        await read(stream)
        assert timer.cancelled()

    with running(make_engine()) as worker:
        asyncio.run(main())


def test_a_slow_reader_loses_its_request_alone() -> None:
    async def main() -> None:
        slow = await worker.submit(ask("slow", LONG))
        quick = await worker.submit(ask("quick", LONG))
        await read(quick)
        await until(lambda: is_idle(worker))
        outputs = []
        with pytest.raises(RequestError, match="more than 50 tokens were waiting"):
            async for batch in slow:
                outputs += batch
        assert tokens_of(outputs) == continuation([5, 6, 7], 51)
        assert worker.metrics.requests["abort"] == 1

    with running(make_engine(0.001), max_unread_outputs=50) as worker:
        asyncio.run(main())


def test_a_loop_that_stands_still_counts_as_slow() -> None:
    loop = asyncio.new_event_loop()
    with running(make_engine(), max_unread_outputs=50) as worker:
        stream = loop.run_until_complete(worker.submit(ask("r", LONG)))
        asyncio.run(until(lambda: is_idle(worker)))  # while `loop` does not run
        assert worker.metrics.requests["abort"] == 1
        with pytest.raises(RequestError, match="waiting to be read"):
            loop.run_until_complete(read(stream))
        loop.close()


def test_a_loop_that_was_closed_harms_nobody() -> None:
    streams: list[RequestStream] = []

    async def leave() -> None:
        streams.append(await worker.submit(ask("left behind", LONG)))

    async def main() -> None:
        assert len(await read(await worker.submit(ask("next")))) == 8
        await until(lambda: is_idle(worker))
        assert worker.state == "running"

    with running(make_engine(0.001)) as worker:
        asyncio.run(leave())
        asyncio.run(main())
        assert worker.metrics.requests["abort"] == 1


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


def test_actions_run_between_steps() -> None:
    async def main() -> None:
        stream = await worker.submit(ask("r", 40, [9] * 100))
        assert await worker.run(lambda engine: threading.current_thread()) is worker._thread
        assert len(await read(stream)) == 40
        await worker.run(Engine.reset_prefix_cache)
        await worker.run(Engine.check_integrity)
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda engine: 1 // 0)
        assert len(await read(await worker.submit(ask()))) == 8

    with running(make_engine()) as worker:
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


def test_threads_take_turns_often() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        with running(make_engine()):
            assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", range(3))
def test_random_comings_and_goings(seed) -> None:
    """Whatever readers do, others get their tokens, and at the end every page is free."""
    random_ = random.Random(seed)

    async def one(number: int) -> None:
        prompt = [random_.randrange(3, VOCAB_SIZE) for _ in range(random_.randrange(1, 120))]
        count = random_.randrange(1, 60)
        await asyncio.sleep(random_.random() * 0.1)
        stream = await worker.submit(ask(f"r{number}", count, prompt, n=random_.randrange(1, 4)))
        fate = random_.random()
        if fate < 0.6:
            async with stream:
                outputs = await read(stream)
            for index in range(stream._channel.request.n):
                assert tokens_of(outputs, index) == continuation(prompt, count)
            return
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(random_.random() * 0.05)
        if fate < 0.8:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        else:
            stream.abort()
            await reader

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(60)))
        await until(lambda: is_idle(worker))

    with running(make_engine(num_pages=40, max_batch_size=6)) as worker:
        asyncio.run(main())
