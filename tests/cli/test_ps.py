"""`ps`: processes of this machine, and servers asked over HTTP."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlc_llm.cli.main import main
from mlc_llm.cli.table import format_age, format_duration, render_table
from mlc_llm.prepare.cache import CacheHome
from mlc_llm.prepare.processes import RunFile

METRICS = """# HELP mlc_llm_num_requests_running Sequences that are being computed.
# TYPE mlc_llm_num_requests_running gauge
mlc_llm_num_requests_running{engine="0",model_name="tiny"} 3.0
mlc_llm_num_requests_waiting{engine="0",model_name="tiny"} 12.0
"""
PAGES = {
    "/v1/models": json.dumps({"data": [{"id": "tiny"}, {"id": "embedder"}]}),
    "/metrics": METRICS,
}


class Handler(BaseHTTPRequestHandler):
    """Answers what a server of ours does, to whoever has the key."""

    key = ""

    def do_GET(self) -> None:
        is_open = not self.key or self.headers.get("authorization") == f"Bearer {self.key}"
        status = 200 if self.path in PAGES else 404
        body = PAGES.get(self.path, "").encode() if is_open else b""
        self.send_response(status if is_open else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A server that answers, and a cache of its own for the commands."""
    monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("MLC_LLM_API_KEY", raising=False)
    monkeypatch.setattr(Handler, "key", "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    assert main(["ps", *words, "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_nobody_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no model is in use" in captured.err
    assert rows(capsys) == []


def test_processes_of_this_machine(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = CacheHome(tmp_path)
    server = RunFile(home, "serve", "HF://user/tiny", [])
    (starting,) = rows(capsys)
    assert (starting["state"], starting["url"]) == ("starting", None)
    server.listen(url)
    talk = RunFile(home, "chat", "demo", [])
    first, second = rows(capsys)
    assert (first["model"], first["state"], first["url"]) == ("HF://user/tiny", "running", url)
    assert (first["num_running"], first["num_waiting"]) == (3, 12)
    assert first["pid"] == os.getpid()
    assert isinstance(first["memory_bytes"], int) and first["memory_bytes"] > 1 << 20
    assert isinstance(first["uptime_s"], float) and 0 <= first["uptime_s"] < 300
    assert (second["command"], second["state"]) == ("chat", "running")
    assert second["num_running"] is None
    assert main(["ps"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["MODEL", "PID", "ADDRESS", "UP", "MEMORY", "RUN", "WAIT", "STATE"]
    assert [line.split()[0] for line in lines] == ["HF://user/tiny", "demo"]
    server.close()
    talk.close()
    assert rows(capsys) == []


def test_a_server_that_does_not_answer_or_wants_a_key(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = RunFile(CacheHome(tmp_path), "serve", "a", [])
    silent.listen("http://127.0.0.1:1")
    assert [row["state"] for row in rows(capsys)] == ["silent"]
    silent.close()
    monkeypatch.setattr(Handler, "key", "secret")
    locked = RunFile(CacheHome(tmp_path), "serve", "b", [])
    locked.listen(url)
    assert [row["state"] for row in rows(capsys)] == ["locked"]
    assert [row["num_running"] for row in rows(capsys, "--api-key", "secret")] == [3]
    monkeypatch.setenv("MLC_LLM_API_KEY", "secret")
    assert [row["state"] for row in rows(capsys)] == ["running"]
    locked.close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_server_by_its_address(url: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat, embedder = rows(capsys, url + suffix)
    assert (chat["model"], chat["num_running"], chat["num_waiting"]) == ("tiny", 3, 12)
    assert (embedder["model"], embedder["num_running"]) == ("embedder", None)
    assert chat["pid"] is None and chat["url"] == url


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("127.0.0.1:8000", 2, "is not an address"),
        ("http://127.0.0.1:1", 1, "does not answer"),
        ("{url}/elsewhere", 1, "HTTP status 404"),
    ],
)
def test_mistakes_are_told(
    url: str, target: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ps", target.format(url=url)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and "Traceback" not in captured.err


def test_a_wrong_key_is_told(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "key", "secret")
    assert main(["ps", url, "--api-key", "wrong"]) == 1
    assert "wants another key" in capsys.readouterr().err


def test_what_is_no_openai_server_is_told(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PAGES, "/v1/models", "<html>")
    assert main(["ps", url]) == 1
    assert "does not answer like an OpenAI server" in capsys.readouterr().err


def test_tables_never_cut_names() -> None:
    headers = ["NAME", "KIND", "SIZE"]
    table = [["short", "raw", "1 kB"], ["x" * 40, "GGUF", "12 kB"]]
    wide = render_table(headers, table, right=("SIZE",))
    assert wide[0] == "NAME" + " " * 38 + "KIND   SIZE"
    assert wide[2] == "x" * 40 + "  GGUF  12 kB"
    narrow = render_table(headers, table, right=("SIZE",), width=30)
    assert narrow[0] == "NAME               KIND   SIZE"
    assert narrow[1] == "short              raw    1 kB"
    assert narrow[2:] == ["x" * 40, "                   GGUF  12 kB"]
    assert all(len(line) <= 30 for line in narrow if "x" not in line)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (86400 * 30, "30 d"), (-5, "0 s")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
    assert format_age(1000.0, 1000.0 + seconds) == f"{text} ago"
    assert format_age(None) == "never"
