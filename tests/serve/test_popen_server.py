"""The server as a child process: started, waited for, ended; its command line."""

from __future__ import annotations

import socket
import sys
import urllib.request

import pytest

from mlc_llm.errors import EngineStopped, OptionError
from mlc_llm.serve import PopenServer

# A server that is ready after a moment, as ours is.
SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
time.sleep(0.2)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_server(port: int, script: str, start_timeout_s: float = 20.0) -> PopenServer:
    """Return a server whose program is a script."""
    server = PopenServer("model", port=port, start_timeout_s=start_timeout_s)
    server._command = [sys.executable, "-c", script, str(port)]
    return server


def test_it_answers_inside_the_block_and_is_gone_after(port: int) -> None:
    with make_server(port, SERVER) as server:
        assert server.base_url == f"http://127.0.0.1:{port}"
        assert server.openai_v1_base_url == f"http://127.0.0.1:{port}/v1"
        with urllib.request.urlopen(f"{server.base_url}/health", timeout=5) as answer:
            assert answer.status == 200
        server.start()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    server.terminate()


def test_a_server_that_ends_at_once_is_reported(port: int) -> None:
    with pytest.raises(EngineStopped, match="exit code 3"):
        make_server(port, "raise SystemExit(3)").start()


def test_a_server_that_never_answers_is_ended(port: int) -> None:
    server = make_server(port, "import time; time.sleep(60)", start_timeout_s=0.5)
    with pytest.raises(EngineStopped, match=r"within 0\.5 s"):
        server.start()
    assert server._process is None


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = int(other.getsockname()[1])
        with pytest.raises(OptionError, match="another program listens"):
            make_server(taken, SERVER).start()


def test_the_command_line() -> None:
    server = PopenServer(
        "dist/model", model_lib="lib.so", mode="server", arguments=["--api-key", "k"]
    )
    assert server._command[1:] == [
        *("-m", "mlc_llm", "serve", "dist/model", "--device", "auto", "--mode", "server"),
        *("--host", "127.0.0.1", "--port", "8082", "--model-lib", "lib.so", "--api-key", "k"),
    ]
    assert PopenServer("m", host="::1").base_url == "http://[::1]:8082"
    with pytest.raises(OptionError, match="port"):
        PopenServer("m", port=0)
