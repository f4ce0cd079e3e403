"""Event streams: their form, errors on the way, clients that go away or stop reading."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live_server
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from mlc_llm.errors import QueueFull, StepFailed
from mlc_llm.serve.errors import failure_of
from mlc_llm.serve.gate import Gate, Traffic
from mlc_llm.serve.sse import start_events, while_connected

SEND_TIMEOUT_S = 0.5


class Chunk(BaseModel):
    number: int
    text: str = ""


class Source:
    """Chunks of a chosen kind, and what became of them."""

    def __init__(self) -> None:
        self.num_made = 0
        self.is_closed = threading.Event()
        self.is_started = threading.Event()

    async def open(self, kind: str) -> AsyncIterator[Chunk]:
        if kind == "full":
            raise QueueFull("the queue is full", 7)
        return self.chunks(kind)

    async def chunks(self, kind: str) -> AsyncIterator[Chunk]:
        self.is_started.set()
        try:
            if kind == "first":
                raise StepFailed("the first step failed")
            if kind == "waiting":
                await asyncio.sleep(60)
            for number in range(3 if kind in ("three", "fails", "breaks") else 1_000_000):
                self.num_made += 1
                yield Chunk(number=number, text="ü\n" + "x" * (50_000 if kind == "large" else 0))
                await asyncio.sleep(0 if kind != "endless" else 0.005)
            if kind == "fails":
                raise StepFailed("a step failed")
            if kind == "breaks":
                raise KeyError("secret")
        finally:
            self.is_closed.set()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def server(source: Source) -> Iterator[LiveServer]:
    async def stream(request: Request) -> Response:
        await request.body()
        opening = source.open(request.path_params["kind"])
        return await start_events(request, opening, SEND_TIMEOUT_S)

    async def once(request: Request) -> Response:
        await request.body()

        async def work() -> str:
            source.is_started.set()
            try:
                await asyncio.sleep(60)
            finally:
                source.is_closed.set()
            return "done"

        return PlainTextResponse(await while_connected(request.receive, work()))

    async def answer(request: Request, error: Exception) -> Response:
        failure = failure_of(error)
        return Response(failure.body_bytes, failure.status, dict(failure.headers))

    traffic = Traffic()
    handlers: dict[Any, Any] = {QueueFull: answer, StepFailed: answer}
    routes = [Route("/stream/{kind}", stream), Route("/once", once)]
    app = Gate(Starlette(routes=routes, exception_handlers=handlers), traffic)
    with live_server(app, traffic=traffic, drain_timeout_s=0) as live:
        yield live


def events_of(text: str) -> list[str]:
    assert text.endswith("\n\n")
    events = text[:-2].split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def test_events_are_json_and_end_with_done(server: LiveServer, source: Source) -> None:
    response = httpx.get(f"{server.url}/stream/three")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    *chunks, last = events_of(response.text)
    assert [json.loads(chunk) for chunk in chunks] == [
        {"number": number, "text": "ü\n"} for number in range(3)
    ]
    assert last == "[DONE]"
    assert source.is_closed.wait(5)


def test_what_fails_before_the_first_event_has_a_status(server: LiveServer, source: Source) -> None:
    full = httpx.get(f"{server.url}/stream/full")
    assert (full.status_code, full.headers["retry-after"]) == (429, "7")
    first = httpx.get(f"{server.url}/stream/first")
    assert (first.status_code, first.json()["error"]["code"]) == (500, "step_failed")


def test_what_fails_later_is_an_event_and_the_last_one(server: LiveServer) -> None:
    *chunks, last = events_of(httpx.get(f"{server.url}/stream/fails").text)
    assert len(chunks) == 3
    assert json.loads(last)["error"] == {
        "message": "a step failed",
        "type": "server_error",
        "param": None,
        "code": "step_failed",
    }


def test_a_fault_of_ours_is_an_event_that_tells_nothing(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    received = b""
    with httpx.stream("GET", f"{server.url}/stream/breaks") as response:
        with pytest.raises(httpx.RemoteProtocolError):
            for piece in response.iter_raw():
                received += piece
    last = json.loads(events_of(received.decode())[-1])
    assert last["error"]["code"] == "internal_error"
    assert b"secret" not in received
    assert "secret" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


def test_the_chunks_are_closed_when_the_client_goes(server: LiveServer, source: Source) -> None:
    with httpx.stream("GET", f"{server.url}/stream/endless") as response:
        lines = (line for line in response.iter_lines() if line)
        assert [json.loads(next(lines)[6:])["number"] for _ in range(3)] == [0, 1, 2]
    assert source.is_closed.wait(2)
    assert source.num_made < 100


@pytest.mark.parametrize("path", ["/stream/waiting", "/once"])
def test_waiting_ends_when_the_client_goes(server: LiveServer, source: Source, path: str) -> None:
    connection = server.connect()
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert source.is_started.wait(5)
    connection.close()
    assert source.is_closed.wait(2)
    assert_idle(server)


def test_a_client_that_does_not_read_is_given_up(server: LiveServer, source: Source) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /stream/large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        started = time.monotonic()
        assert source.is_closed.wait(20 * SEND_TIMEOUT_S)
        assert time.monotonic() - started >= SEND_TIMEOUT_S
        num_made = source.num_made
        # What was made lies in the buffers of two sockets; far less than what there was to send.
        assert num_made < 1000
        assert_idle(server)
        assert source.num_made == num_made


def test_a_slow_client_that_reads_is_not_given_up(server: LiveServer, source: Source) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /stream/large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        deadline = time.monotonic() + 3 * SEND_TIMEOUT_S
        while time.monotonic() < deadline:
            assert connection.recv(1 << 20)
            time.sleep(0.02)
        assert not source.is_closed.is_set()
    assert source.is_closed.wait(2)


def assert_idle(server: LiveServer) -> None:
    deadline = time.monotonic() + 2
    while server.traffic.num_in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.traffic.num_in_flight == 0
