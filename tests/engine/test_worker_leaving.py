"""Readers that leave, are slow, or whose event loop ends."""

from __future__ import annotations

import asyncio
import gc

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

from mlc_llm.engine.stream import RequestStream
from mlc_llm.errors import (
    RequestError,
)


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
