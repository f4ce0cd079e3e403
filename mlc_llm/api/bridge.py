"""From threads without an event loop to one that runs in a thread of its own, and back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine, Generator
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar

from mlc_llm.api.owner import check_process
from mlc_llm.api.resources import AsyncStream
from mlc_llm.errors import EngineStopped

Item = TypeVar("Item")

_STOPPED = "the engine has been terminated; make another one"
_SECONDS_FOR_LAST_ANSWERS = 1.0


class Bridge:
    """Runs coroutines for any number of threads; ends with `close`, its last user, or at exit."""

    def __init__(self) -> None:
        self._thread = _LoopThread()
        self._end = weakref.finalize(self, self._thread.close)

    def run(self, call: Coroutine[Any, Any, Item]) -> Item:
        """Return what a coroutine returns; Ctrl-C cancels it. Raises EngineStopped if closed."""
        future = self._thread.submit(call)
        try:
            return future.result()
        except CancelledError:
            raise EngineStopped(_STOPPED) from None
        except BaseException:
            future.cancel()
            raise

    def iterate(self, stream: AsyncStream[Item]) -> Generator[Item, None, None]:
        """Yield what a stream brings; leaving early closes it, without waiting for that."""
        try:
            while True:
                try:
                    item = self.run(_next_of(stream))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            with contextlib.suppress(EngineStopped):
                self._thread.submit(stream.close())

    def close(self) -> None:
        """End what runs there; calling it again does nothing."""
        self._end()


class _LoopThread:
    """A thread that runs an event loop until `close`."""

    def __init__(self) -> None:
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._is_open = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_run, args=(self._loop,), name="mlc_llm sync", daemon=True
        )
        self._thread.start()

    def submit(self, call: Coroutine[Any, Any, Item]) -> Future[Item]:
        try:
            check_process(self._process_id)
            with self._lock:
                if not self._is_open:
                    raise EngineStopped(_STOPPED)
                return asyncio.run_coroutine_threadsafe(call, self._loop)
        except EngineStopped:
            call.close()
            raise

    def close(self) -> None:
        if os.getpid() != self._process_id:
            return
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            asyncio.run_coroutine_threadsafe(_finish(), self._loop)
        # The collector may call this on any thread, the loop's own included.
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _next_of(stream: AsyncStream[Item]) -> Item:
    return await anext(stream)


async def _finish() -> None:
    """Let tasks see the end of their requests, cancel what is left, and stop the loop."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        _, unfinished = await asyncio.wait(tasks, timeout=_SECONDS_FOR_LAST_ANSWERS)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
    loop.stop()


class Stream(Generic[Item]):
    """Chunks of an answer as they come. Leaving its block, or `close`, aborts the request."""

    def __init__(self, bridge: Bridge, stream: AsyncStream[Item]) -> None:
        self.request_id = stream.request_id
        self._chunks = bridge.iterate(stream)

    def __iter__(self) -> Stream[Item]:
        """Return the stream."""
        return self

    def __next__(self) -> Item:
        """Wait for the next chunk."""
        return next(self._chunks)

    def close(self) -> None:
        """Abort what is not finished."""
        self._chunks.close()

    def __enter__(self) -> Stream[Item]:
        """Return the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Abort what is not finished."""
        self.close()
