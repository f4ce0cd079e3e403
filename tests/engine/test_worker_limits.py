"""How many requests wait, and how long they may take."""

from __future__ import annotations

import asyncio
import time

import pytest
from engine_workers import (
    LONG,
    ask,
    is_idle,
    make_engine,
    read,
    runner_of,
    running,
    tokens_of,
    until,
)
from fakes import continuation

from mlc_llm.engine.worker import EngineWorker
from mlc_llm.errors import (
    QueueFull,
    RequestTimeout,
)


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
