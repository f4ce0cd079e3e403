"""The life of the server process: bind, listen, drain on a signal, stop.

Knows sockets and signals; what is served is an ASGI application and its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from mlc_llm.errors import OptionError
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.guard import MAX_HEAD_BYTES
from mlc_llm.serve.http_protocol import MAX_CONNECTIONS, GuardedProtocol

_BACKLOG = 512
_KEEP_ALIVE_S = 30
# Seconds that answers which the engine has given up get to reach their clients.
_LAST_WORDS_S = 2
_SECONDS_BETWEEN_LOOKS = 0.05

_IN_USE = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)

_log = logging.getLogger("mlc_llm.serve")


class Worker(Protocol):
    """What the server must start and stop around serving."""

    def start(self) -> None:
        """Begin to take requests."""

    def stop(self) -> None:
        """End; what still runs fails. May be called twice."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Return sockets bound to every address of `host`; they do not listen yet.

    Raises OptionError that says what is wrong with host or port.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"--port {port} is not a port; it must be from 0 (any free one) to 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise OptionError(
            f"--host {host} has no address here; use 127.0.0.1 for this machine only, "
            "or 0.0.0.0 for all its networks"
        ) from None
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as cleanup:
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            bound = cleanup.enter_context(socket.socket(family, kind, protocol))
            if sys.platform != "win32":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # With port 0, all addresses of the host get the port that the first one got.
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                bound.bind((address[0], chosen, *address[2:]))
            except OSError as error:
                raise _bind_error(host, chosen, error) from None
            bound.setblocking(False)
            sockets.append(bound)
        cleanup.pop_all()
    return sockets


def _bind_error(host: str, port: int, error: OSError) -> OptionError:
    if isinstance(error, PermissionError):
        return OptionError(
            f"--port {port} needs more rights than this user has; use one from 1024 up"
        )
    if error.errno in _IN_USE:
        return OptionError(
            f"--port {port} is in use on {host}; stop the program that uses it, "
            "or choose another port (0 takes any free one)"
        )
    return OptionError(f"cannot listen on {host} port {port}: {error.strerror}")


def url_of(host: str, sockets: Sequence[socket.socket]) -> str:
    """Return where a person on this machine finds the server."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{sockets[0].getsockname()[1]}"


class Server(uvicorn.Server):
    """Serves until a signal, then drains.

    The first SIGTERM or SIGINT: no new requests are taken (503, `/ready` too), those under way are
    finished, for at most `drain_timeout_s`. The second one ends them at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        workers: Sequence[Worker],
        traffic: Traffic,
        *,
        drain_timeout_s: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=GuardedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_WORDS_S,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )
        self.has_drained = True
        self._workers = workers
        self._traffic = traffic
        self._drain_timeout_s = drain_timeout_s
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is under way, then close everything."""
        self._traffic.is_draining = True
        deadline = time.monotonic() + self._drain_timeout_s
        if self._traffic.num_in_flight:
            _log.warning("finishing %d requests before stopping", self._traffic.num_in_flight)
        await self._wait_for_answers(deadline, can_be_forced=True)
        self.has_drained = self._traffic.num_in_flight == 0
        await self.stop_workers()
        # Their requests have failed now; let the clients hear of it.
        await self._wait_for_answers(time.monotonic() + _LAST_WORDS_S, can_be_forced=False)
        for connection in list(self.server_state.connections):
            if isinstance(connection, GuardedProtocol) and connection.is_answering:
                connection.transport.abort()
        await super().shutdown(sockets)

    async def stop_workers(self) -> None:
        """Stop the engines; their threads are waited for."""
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, stop on the second."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; unlike uvicorn's, they do not end the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        originals = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in originals.items():
                signal.signal(number, handler)

    async def _wait_for_answers(self, deadline: float, *, can_be_forced: bool) -> None:
        while self._traffic.num_in_flight and time.monotonic() < deadline:
            if can_be_forced and self.force_exit:
                return
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)


def serve(
    app: ASGIApp,
    workers: Sequence[Worker],
    traffic: Traffic,
    sockets: Sequence[socket.socket],
    *,
    drain_timeout_s: float,
    announce: Callable[[], None],
) -> bool:
    """Serve on bound sockets until a signal; return whether every request was finished.

    Starts and stops the workers. `announce` is called once connections are accepted. Signals come
    to the main thread alone. Raises OptionError where another program listens by now.
    """
    _allow_connections()
    server = Server(app, workers, traffic, drain_timeout_s=drain_timeout_s, announce=announce)
    try:
        for bound in sockets:
            try:
                bound.listen(_BACKLOG)
            except OSError as error:
                host, port = bound.getsockname()[:2]
                raise _bind_error(host, port, error) from None
        for worker in workers:
            worker.start()
        server.run(list(sockets))
    finally:
        for worker in workers:
            worker.stop()
        for bound in sockets:
            bound.close()
    return server.has_drained


def _allow_connections() -> None:
    """Let the process open as many files as it takes connections, where the system allows it."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
