"""The engine's thread: streams, aborts, actions between steps, its sleep."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from typing import Any

import pytest
from engine_workers import (
    GREEDY,
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
from fakes import VOCAB_SIZE, continuation

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Request
from mlc_llm.errors import (
    ContextTooLong,
    RequestError,
)


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
