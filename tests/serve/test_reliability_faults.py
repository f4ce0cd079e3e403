"""Steps that fail, engines that die or hang, signals in the middle of answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import MODEL, served

from mlc_llm.runtime.runner import Step

STEP_S = 0.02
ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Fault(RuntimeError):
    """What a broken kernel might raise; its text must not reach a client."""

    def __init__(self) -> None:
        super().__init__("secret at /usr/lib/secret.so 0x7f0011223344")


def test_a_failed_step_fails_its_request_only(caplog: pytest.LogCaptureFixture) -> None:
    with served(step_s=STEP_S) as server:
        before = server.answer("hello", 6).json()["choices"][0]["text"]
        server.runner.error = Fault()
        failed = server.answer("other", 6)
        assert failed.status_code == 500
        error = failed.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "step_failed")
        assert "secret" not in failed.text and "0x7f" not in failed.text
        assert "secret" in caplog.text
        server.wait_until_idle()
        assert server.answer("hello", 6).json()["choices"][0]["text"] == before
        assert server.client.get("/health").status_code == 200
        assert server.metric("failed_steps_total") == 1


def test_steps_that_fail_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with served(step_s=0.001) as server:
        prompts = [f"hello {number}" for number in range(40)]
        alone = [server.answer(prompt, 20).json()["choices"][0]["text"] for prompt in prompts]
        count = 0

        def fail_sometimes(step: Step) -> None:
            nonlocal count
            count += 1
            if count % 25 == 0:
                raise Fault

        server.runner.before_step = fail_sometimes
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(lambda prompt: server.answer(prompt, 20), prompts))
        server.runner.before_step = lambda step: None
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 500}
        for response, expected in zip(responses, alone, strict=True):
            if response.status_code == 200:
                assert response.json()["choices"][0]["text"] == expected
        server.wait_until_idle()
        server.assert_works()


def test_a_step_that_fails_in_the_middle_of_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    with served(step_s=STEP_S) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
            chunks = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=100,
                stream=True,
            )
            received = 0
            with pytest.raises(openai.APIError, match="step") as failed:
                for _ in chunks:
                    received += 1
                    if received == 5:
                        server.runner.error = Fault()
            assert received >= 5
            assert "secret" not in str(failed.value)
        server.wait_until_idle()
        server.assert_works()


def test_running_out_of_memory_in_a_step(caplog: pytest.LogCaptureFixture) -> None:
    with served(step_s=STEP_S) as server:
        server.runner.error = MemoryError("out of memory")
        assert server.answer().status_code in (500, 503)


def test_a_dead_engine_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with served(step_s=STEP_S) as server:
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(server.answer, "hello", 400) for _ in range(3)]
            wait_for(lambda: len(server.runner.steps) > 5)

            def die(engine: Any) -> None:
                def step() -> None:
                    raise SystemError("the engine's memory is corrupt")

                engine.step = step

            server.worker._commands.put(lambda: die(server.worker.engine))
            for answer in answers:
                response = answer.result(5)
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "engine_stopped"
                assert "corrupt" not in response.text
        health = server.client.get("/health")
        assert health.status_code == 503
        assert "dead" in health.json()["error"]["message"]
        assert server.client.get("/ready").status_code == 503
        assert server.answer().status_code == 503
        assert server.client.get("/metrics").status_code == 200
        del server.worker.engine.step


def test_a_step_that_hangs_is_seen() -> None:
    with served(stuck_after_s=0.3) as server:
        assert server.client.get("/health").status_code == 200
        server.runner.gate.clear()
        asker = threading.Thread(target=lambda: server.answer(max_tokens=2))
        asker.start()
        wait_for(lambda: server.client.get("/health").status_code == 503)
        assert server.client.get("/ready").status_code == 503
        server.runner.gate.set()
        asker.join(10)
        assert server.client.get("/health").status_code == 200


# A whole server in a process of its own, on the fake runner, with steps of 20 ms.
PROGRAM = """
import sys
sys.path[:0] = ["tests", "tests/serve"]
from served import serve_forever
sys.exit(serve_forever(float(sys.argv[1]), float(sys.argv[2])))
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, step_s: float, drain_timeout_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(step_s), str(drain_timeout_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http"), self.process.communicate(timeout=5)[1]

    def stream(self, max_tokens: int) -> tuple[threading.Thread, list[str], list[Exception]]:
        """Read a stream in a thread; returns when its first event has come."""
        lines: list[str] = []
        errors: list[Exception] = []

        def run() -> None:
            body = {"prompt": "hello", "max_tokens": max_tokens, "stream": True}
            try:
                with httpx.stream(
                    "POST", f"{self.url}/v1/completions", json=body, timeout=30
                ) as response:
                    for line in response.iter_lines():
                        if line:
                            lines.append(line)
            except httpx.HTTPError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: lines)
        return thread, lines, errors

    def end(self) -> int:
        self.process.communicate(timeout=20)
        return self.process.returncode


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for server in made:
        server.process.kill()
        server.process.communicate()


def test_sigterm_finishes_streams_and_takes_no_more(processes: list[Process]) -> None:
    processes.append(server := Process(0.02, 30))
    thread, lines, errors = server.stream(100)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_stopped"
    thread.join(20)
    assert not errors
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
    assert len("".join(texts)) == 100
    assert server.end() == 0


def test_a_second_sigterm_ends_streams_with_an_error(processes: list[Process]) -> None:
    processes.append(server := Process(0.05, 60))
    thread, lines, _ = server.stream(400)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 1
    assert time.monotonic() - started < 8
    thread.join(10)
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_stopped"


def test_draining_ends_after_its_time(processes: list[Process]) -> None:
    processes.append(server := Process(0.05, 0.5))
    thread, lines, _ = server.stream(400)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 1
    assert time.monotonic() - started < 8
    thread.join(10)
    assert "engine_stopped" in lines[-1]
