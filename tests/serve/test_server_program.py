"""`mlc_llm serve` as a user runs it, on a tiny model compiled for this CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from mlc_llm.cli.main import main

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """A server process that listens."""

    def __init__(self, home: Path, *arguments: str) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MLC_")
        }
        environment |= {"MLC_LLM_HOME": str(home), "PYTHONPATH": str(ROOT)}
        self.log = home / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlc_llm", "serve", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Listening on http://127.0.0.1:"), self.log.read_text()
        self.url = line.split()[-1]


@pytest.fixture(scope="module")
def program(
    tmp_path_factory: pytest.TempPathFactory, stories260k: Path
) -> Iterator[tuple[Program, str]]:
    home = tmp_path_factory.mktemp("home")
    arguments = f"--quantization q0f32 --port 0 --mode server --threads 1 {stories260k}".split()
    running = Program(home, *arguments, "--overrides", "max_num_sequence=4")
    yield running, str(stories260k)
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
    try:
        assert running.process.wait(20) == 0, running.log.read_text()
        assert list((home / "run").iterdir()) == []
    finally:
        running.process.kill()
        running.process.communicate()


def test_a_story_comes_out_whole_and_streamed(
    program: tuple[Program, str], stories260k: Path
) -> None:
    server, model = program
    expected = (stories260k / "expected.txt").read_text(encoding="utf-8")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        prompt = "Once upon a time"
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=30, temperature=0)
        text = answer.choices[0].text
        assert text and (prompt + text) in expected
        chunks = client.completions.create(
            model=model, prompt=prompt, max_tokens=30, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_the_plan_is_shown_and_the_server_is_well(program: tuple[Program, str]) -> None:
    server, model = program
    assert "memory plan (server)" in server.log.read_text()
    assert httpx.get(f"{server.url}/ready").status_code == 200
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [card["id"] for card in models] == [model]


def test_the_server_is_listed(
    program: tuple[Program, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, model = program
    home = server.log.parent
    monkeypatch.setenv("MLC_LLM_HOME", str(home))
    for words in (["ps", "--json"], ["ps", server.url, "--json"]):
        assert main(words) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["model"], row["url"], row["state"]) == (model, server.url, "running")
        assert (row["num_running"], row["num_waiting"]) == (0, 0)
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pid"] == server.process.pid
    # What it runs cannot be removed; afterwards its file is gone, see below.
    assert main(["rm", model, "--yes"]) == 1
    assert f"in use by `mlc_llm serve` (process {server.process.pid}" in capsys.readouterr().err


def test_the_port_is_taken_for_a_second_server(
    program: tuple[Program, str], stories260k: Path, tmp_path: Path
) -> None:
    server, _ = program
    port = server.url.rpartition(":")[2]
    second = subprocess.run(
        [sys.executable, "-m", "mlc_llm", "serve", str(stories260k), "--port", port],
        capture_output=True,
        text=True,
        env={**os.environ, "MLC_LLM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1].startswith(f"error: --port {port} is in use")
