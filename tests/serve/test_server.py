"""The life of a server process: addresses, signals, draining, exit."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import live_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mlc_llm.errors import OptionError
from mlc_llm.serve.gate import Gate, Traffic
from mlc_llm.serve.server import bind, serve, url_of

# A server whose only work is to wait: "/wait/2" answers after 2 seconds.
PROGRAM = """
import asyncio, sys
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from mlc_llm.serve.gate import Gate, Traffic
from mlc_llm.serve.server import bind, serve, url_of

async def wait(request):
    await asyncio.sleep(float(request.path_params["seconds"]))
    return PlainTextResponse("done")

async def ready(request):
    return PlainTextResponse("ready", 503 if traffic.is_draining else 200)

class Worker:
    def start(self):
        print("started", flush=True)
    def stop(self):
        print("stopped", flush=True)

traffic = Traffic()
app = Gate(Starlette(routes=[Route("/wait/{seconds}", wait), Route("/ready", ready)]), traffic)
sockets = bind("127.0.0.1", 0)
has_drained = serve(app, [Worker()], traffic, sockets, drain_timeout_s=float(sys.argv[1]),
                    announce=lambda: print(url_of("127.0.0.1", sockets), flush=True))
sys.exit(0 if has_drained else 1)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, drain_timeout_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(drain_timeout_s)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "started\n"
        self.url = self.process.stdout.readline().strip()

    def ask(self, seconds: float) -> tuple[threading.Thread, list[Any]]:
        """Ask from a thread; the list gets the text of the answer or the error."""
        answers: list[Any] = []

        def run() -> None:
            try:
                answers.append(httpx.get(f"{self.url}/wait/{seconds}", timeout=20).text)
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.3)
        return thread, answers

    def end(self) -> tuple[int, str]:
        """Return exit code and the rest of the output."""
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for server in made:
        server.process.kill()
        server.process.communicate()


def start(processes: list[Process], drain_timeout_s: float = 10.0) -> Process:
    processes.append(Process(drain_timeout_s))
    return processes[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_at_once(
    processes: list[Process], number: signal.Signals
) -> None:
    server = start(processes)
    assert httpx.get(f"{server.url}/ready").status_code == 200
    started = time.monotonic()
    server.process.send_signal(number)
    code, output = server.end()
    assert code == 0
    assert output.startswith("stopped\n")
    assert time.monotonic() - started < 3


def test_a_signal_lets_answers_finish_and_takes_no_more(processes: list[Process]) -> None:
    server = start(processes)
    thread, answers = server.ask(1.5)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert httpx.get(f"{server.url}/ready").status_code == 503
    refused = httpx.get(f"{server.url}/wait/0")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_stopped"
    assert "retry-after" in refused.headers
    thread.join(10)
    assert answers == ["done"]
    code, _ = server.end()
    assert code == 0


def test_a_second_signal_ends_it_at_once(processes: list[Process]) -> None:
    server = start(processes, drain_timeout_s=60)
    thread, answers = server.ask(30)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    code, output = server.end()
    assert code == 1
    assert "stopped" in output
    assert time.monotonic() - started < 10
    thread.join(10)
    assert isinstance(answers[0], httpx.RemoteProtocolError | httpx.ReadError)


def test_draining_has_an_end(processes: list[Process]) -> None:
    server = start(processes, drain_timeout_s=0.5)
    thread, answers = server.ask(30)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    code, _ = server.end()
    assert code == 1
    assert time.monotonic() - started < 10
    thread.join(10)
    assert isinstance(answers[0], httpx.HTTPError)


def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=rf"--port {port} is in use on 127\.0\.0\.1"):
            bind("127.0.0.1", port)


def test_a_port_that_was_taken_meanwhile_is_an_error() -> None:
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    other = bind("127.0.0.1", port)[0]
    try:
        other.listen()
        with pytest.raises(OptionError, match=f"--port {port} is in use"):
            serve(
                Starlette(),
                [],
                Traffic(),
                sockets,
                drain_timeout_s=0,
                announce=lambda: pytest.fail("it listens"),
            )
    finally:
        other.close()


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("no-such-host.invalid", 0, "--host no-such-host.invalid has no address"),
        ("a" * 300, 0, "has no address"),
        ("127.0.0.1", 65536, "--port 65536 is not a port"),
        ("127.0.0.1", -1, "--port -1 is not a port"),
    ],
)
def test_bad_addresses_are_errors_that_say_so(host: str, port: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bind(host, port)


def test_a_port_without_rights_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OptionError, match="--port 80 needs more rights"):
        bind("127.0.0.1", 80)


def test_every_address_of_a_host_gets_the_same_port() -> None:
    sockets = bind("localhost", 0)
    ports = {bound.getsockname()[1] for bound in sockets}
    for bound in sockets:
        bound.close()
    assert len(ports) == 1


def test_url() -> None:
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    assert url_of("127.0.0.1", sockets) == f"http://127.0.0.1:{port}"
    assert url_of("::1", sockets) == f"http://[::1]:{port}"
    sockets[0].close()


def test_draining_refuses_but_tells_its_state() -> None:
    async def ok(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    traffic = Traffic()
    app = Gate(Starlette(routes=[Route("/health", ok), Route("/work", ok)]), traffic)
    with live_server(app, traffic=traffic) as server:
        traffic.is_draining = True
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.get(f"{server.url}/work")
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")


def test_traffic_is_counted_in_valid_prometheus_text() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    traffic = Traffic()
    traffic.count("GET", "/health", 200, 0.5)
    traffic.count("GET", "/health", 200, 0.25)
    traffic.count("POST", "unmatched", 404, 0.5)
    families = {f.name: f for f in text_string_to_metric_families(traffic.prometheus_text())}
    counts = {
        (s.labels["method"], s.labels["handler"], s.labels["status"]): s.value
        for s in families["mlc_llm_http_requests"].samples
    }
    assert counts == {("GET", "/health", "200"): 2, ("POST", "unmatched", "404"): 1}
    durations = families["mlc_llm_http_request_duration_seconds"].samples
    assert [s.value for s in durations if s.labels["method"] == "GET"] == [0.75, 2]
    assert families["mlc_llm_http_requests_in_flight"].samples[0].value == 0
