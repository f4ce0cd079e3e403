"""The outputs of one request on their way from the engine's thread to its reader's event loop.

Knows nothing of engines. What belongs to which thread is said at each field.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType

from mlc_llm.engine.metrics import RequestStats
from mlc_llm.engine.request import FinishReason, Output, Request
from mlc_llm.errors import RequestError


class Channel:
    """What the engine's thread and the reader of one request share."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.loop = loop
        # Of the engine's thread.
        self.unfinished = set(range(request.n))
        self.num_sent = 0
        # Of the loop; the engine's thread looks at the first two.
        self.num_read = 0
        self.is_closed = False  # nobody wants to know any more
        self.stats = RequestStats(prompt_tokens=len(request.prompt))
        self.unread: list[Output] = []
        self.error: RequestError | None = None
        self.num_left = request.n
        self.timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Return whether nothing more will come."""
        return self.is_closed or self.error is not None or self.num_left == 0

    def put(self, item: Output | RequestError) -> None:
        """Take an output, or an error that ends everything, for the reader."""
        if self.is_over:
            return
        if isinstance(item, RequestError):
            self.error = item
        else:
            self.stats = item.stats
            self.unread.append(item)
            self.num_left -= item.finish_reason is not None
        if self.is_over:
            self.stop_timer()
        self.wake()

    def wake(self) -> None:
        """Let the reader look."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def stop_timer(self) -> None:
        """Forget the time limit."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    async def wait(self) -> None:
        """Return when there is something to read or the end is known."""
        if self.unread or self.is_over:
            return
        if self._reader is not None:
            raise RuntimeError("a request's outputs have one reader at a time")
        self._reader = self.loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def take(self) -> list[Output]:
        """Return what arrived since the last time."""
        outputs, self.unread = self.unread, []
        self.num_read += len(outputs)
        return outputs


def deliver(items: Iterable[tuple[Channel, Output | RequestError]]) -> None:
    """Put what a step brought into the channels of one loop, on that loop."""
    for channel, item in items:
        channel.put(item)


class RequestStream:
    """The outputs of a request: an asynchronous iterator of what arrived since the last look.

    It ends after the last sequence's last output; errors of the whole request are raised, after
    what came before. Leaving it early frees the request's pages within a step, be it by `aclose`,
    the end of an `async with` block, cancelling the task that waits here, or dropping the object.
    """

    def __init__(self, channel: Channel, abort: Callable[[str, FinishReason], None]) -> None:
        self._channel = channel
        self._abort = abort

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._channel.request.request_id

    @property
    def stats(self) -> RequestStats:
        """Counts and times so far."""
        return self._channel.stats

    def abort(self, reason: FinishReason = "abort") -> None:
        """End the request within a step; its last outputs say so with `reason`.

        "stop" is for text that has met a stop string, which the engine cannot see.
        """
        if not self._channel.is_over:
            self._abort(self.request_id, reason)

    async def aclose(self) -> None:
        """Want no more outputs; what is unfinished is aborted."""
        self._close()

    def _close(self) -> None:
        self.abort()
        self._channel.is_closed = True
        self._channel.stop_timer()
        self._channel.wake()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[Output]:
        channel = self._channel
        try:
            await channel.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self._close()
            raise
        if channel.is_closed:
            raise StopAsyncIteration
        if channel.unread:
            return channel.take()
        if channel.error is not None:
            channel.is_closed = True
            raise channel.error
        raise StopAsyncIteration

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __del__(self) -> None:
        # May run on any thread: no timers and futures here.
        self.abort()
        self._channel.is_closed = True
