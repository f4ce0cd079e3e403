"""A server on a free loopback port for the length of a test, and raw connections to it."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.server import Server, Worker, bind


@dataclass
class LiveServer:
    """Where a server listens, and the server."""

    port: int
    server: Server
    traffic: Traffic

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def exchange(self, data: bytes) -> bytes:
        """Send bytes and return everything that comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def read_answer(connection: socket.socket) -> bytes:
    """Return head and body of one answer, whose length is announced."""
    received, missing = b"", 1
    while missing > 0:
        piece = connection.recv(65536)
        assert piece, f"the connection ended after {received!r}"
        received += piece
        head, end, body = received.partition(b"\r\n\r\n")
        if end:
            [length] = re.findall(rb"\r\ncontent-length: (\d+)", head.lower())
            missing = int(length) - len(body)
    return received


@contextmanager
def live_server(
    app: ASGIApp,
    workers: Sequence[Worker] = (),
    traffic: Traffic | None = None,
    drain_timeout_s: float = 5.0,
) -> Iterator[LiveServer]:
    """Serve in a thread; leaving stops the server and its workers."""
    traffic = traffic or Traffic()
    sockets = bind("127.0.0.1", 0)
    is_listening = threading.Event()
    server = Server(
        app, workers, traffic, drain_timeout_s=drain_timeout_s, announce=is_listening.set
    )
    for worker in workers:
        worker.start()
    problems: list[Any] = []

    def run() -> None:
        try:
            server.run(sockets)
        except BaseException as error:
            problems.append(error)
            raise
        finally:
            is_listening.set()

    thread = threading.Thread(target=run, name="live server")
    thread.start()
    try:
        assert is_listening.wait(10) and not problems
        yield LiveServer(sockets[0].getsockname()[1], server, traffic)
    finally:
        if server.should_exit:
            server.force_exit = True
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
