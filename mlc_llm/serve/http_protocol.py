"""uvicorn's HTTP/1.1 connection with our limits: answers in OpenAI's shape, and no idle guests.

Knows bytes and times of a connection. What comes after a request's head is up to the ASGI layers.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mlc_llm.serve.errors import Failure, failure_of_status
from mlc_llm.serve.guard import MAX_HEAD_BYTES, head_too_large
from mlc_llm.serve.sse import TRANSPORT

# Seconds in which the head of a request has to arrive.
HEAD_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 1000


class GuardedProtocol(H11Protocol):
    """Refuses too many connections (503), too large heads (431) and too slow ones (408)."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request has come and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or turn it away where there are too many."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, TRANSPORT: transport}
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(failure_of_status(503, "the server has too many connections; try later"))
            return
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a head that has begun must be complete in time."""
        super().data_received(data)
        is_waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not is_waiting:
            self._stop_timer()
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no request that we take."""
        error = sys.exc_info()[1]
        is_too_large = getattr(error, "error_status_hint", 400) == 431
        if is_too_large:
            self._refuse(head_too_large(MAX_HEAD_BYTES))
        else:
            self._refuse(failure_of_status(400, "this is not a valid HTTP/1.1 request"))

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            text = f"the request did not arrive within {HEAD_TIMEOUT_S:g} s"
            self._refuse(failure_of_status(408, text))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, failure: Failure) -> None:
        """Answer without a request, and close."""
        self._stop_timer()
        body = failure.body_bytes
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=failure.status, headers=headers, reason=b"")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
