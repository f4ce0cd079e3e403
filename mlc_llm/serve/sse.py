"""Answers to clients that may go away: server-sent events, and single answers that are watched.

Plain ASGI on the streaming path: a token costs one serialisation and one send. Does not know what
the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mlc_llm.errors import MlcError
from mlc_llm.serve.errors import Failure, failure_of

# A client that takes nothing for so long is given up.
SEND_TIMEOUT_S = 30.0
# The key of `scope["state"]` under which the HTTP server puts the connection.
TRANSPORT = "transport"

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Tells reverse proxies to pass events on as they come.
    (b"x-accel-buffering", b"no"),
)

_T = TypeVar("_T")
_Chunk = TypeVar("_Chunk", bound=BaseModel)


@dataclass(frozen=True)
class EventFormat:
    """How a protocol writes chunks and failures as events, and what it sends after the last one."""

    write: Callable[[Any], bytes]
    write_failure: Callable[[Failure], bytes]
    end: bytes = b""


def event_of(chunk: BaseModel) -> bytes:
    """Return a chunk as an event without a name."""
    return b"data: " + chunk.__pydantic_serializer__.to_json(chunk) + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """Return JSON as an event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def named_event_of(chunk: Any) -> bytes:
    """Return a chunk that has a `type` as an event of that name."""
    return named_event(chunk.type, chunk.__pydantic_serializer__.to_json(chunk))


# Chats and completions.
PLAIN = EventFormat(
    event_of, lambda failure: b"data: " + failure.body_bytes + b"\n\n", b"data: [DONE]\n\n"
)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return what `work` returns, or cancel it when the client disconnects first.

    The body must have been read. Raises what `work` raises, and starlette's ClientDisconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancel(task)
        await _cancel(watch)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end; it has been answered for, whatever it raises."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()


async def start_events(
    request: Request,
    opening: Awaitable[AsyncIterator[_Chunk]],
    send_timeout_s: float,
    form: EventFormat = PLAIN,
) -> EventStream:
    """Return the answer that sends the chunks, once the first one is there.

    What is wrong with a request shows before that, so it is raised here and gets a status.
    """

    async def open_and_wait() -> EventStream:
        chunks = await opening
        try:
            first = await anext(chunks, None)
        except BaseException:
            await _close(chunks)
            raise
        return EventStream(first, chunks, send_timeout_s, form)

    return await while_connected(request.receive, open_and_wait())


async def _close(chunks: AsyncIterator[Any]) -> None:
    """Tell a generator that nobody reads on, so that it gives back what it holds."""
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()


class EventStream(Response):
    """Sends chunks as events.

    An error on the way is the last event. When the client goes away, or takes nothing for
    `send_timeout_s`, the chunks are closed and the connection too.
    """

    def __init__(
        self,
        first: BaseModel | None,
        chunks: AsyncIterator[BaseModel],
        send_timeout_s: float = SEND_TIMEOUT_S,
        form: EventFormat = PLAIN,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._first = first
        self._chunks = chunks
        self._send_timeout_s = send_timeout_s
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await while_connected(receive, self._send_all(scope, send))
        finally:
            await _close(self._chunks)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        with _Patience(scope, self._send_timeout_s) as patience:
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            write, write_failure = self._form.write, self._form.write_failure
            try:
                if self._first is not None:
                    await patience.send(send, write(self._first))
                    async for chunk in self._chunks:
                        await patience.send(send, write(chunk))
                last = self._form.end
            except MlcError as error:
                last = write_failure(failure_of(error))
            except Exception as error:
                await patience.send(send, write_failure(failure_of(error)))
                raise
            await patience.send(send, last)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Patience:
    """Cuts the connection when one send lasts too long; costs a clock reading a send."""

    def __init__(self, scope: Scope, timeout_s: float) -> None:
        self._transport = scope.get("state", {}).get(TRANSPORT)
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._sending_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> _Patience:
        self._look()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def send(self, send: Send, body: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": True}
        self._sending_since = self._loop.time()
        await send(message)
        self._sending_since = None

    def _look(self) -> None:
        since, now = self._sending_since, self._loop.time()
        if since is not None and now - since >= self._timeout_s and self._transport is not None:
            # The stream then ends as with any client that has gone.
            self._transport.abort()
            return
        self._timer = self._loop.call_later(self._timeout_s / 4, self._look)
