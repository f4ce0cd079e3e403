"""Clients that leave, do not read, or are too many: pages come back, others are served."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from live_server import read_answer
from served import MODEL, Served, served

import mlc_llm.serve.body
from mlc_llm.serve.options import AppOptions

STEP_S = 0.02


@pytest.fixture
def server() -> Iterator[Served]:
    with served(step_s=STEP_S) as running:
        yield running
        running.wait_until_idle()
        running.assert_works()


def raw_request(path: str, **body: object) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def wait_for(condition: object, seconds: float = 5.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_left_at_its_third_token_gives_its_pages_back(server: Served, path: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "prompt": "hello",
        "max_tokens": 400,
        "stream": True,
        "n": 2,
    }
    del body["prompt" if "chat" in path else "messages"]
    with server.client.stream("POST", path, json=body, timeout=10) as response:
        lines = response.iter_lines()
        for _ in range(9):
            next(lines)
        assert server.num_used_pages > 0
    left_at = len(server.runner.steps)
    server.wait_until_idle()
    # A step that ran, one that may have begun, and those before the loop heard of the closing.
    assert len(server.runner.steps) - left_at <= 10
    assert server.metric("request_success_total", finished_reason="abort") == 1


def test_an_answer_that_nobody_waits_for_is_ended(server: Served) -> None:
    connection = server.live.connect()
    connection.sendall(raw_request("/v1/completions", prompt="hello", max_tokens=400))
    wait_for(lambda: len(server.runner.steps) >= 3)
    connection.close()
    server.wait_until_idle()
    assert len(server.runner.steps) < 100


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_the_queue(stream: bool) -> None:
    with served(step_s=STEP_S, batch=1) as server:
        first = server.live.connect()
        first.sendall(raw_request("/v1/completions", prompt="hello", max_tokens=400))
        wait_for(lambda: server.metric("num_requests_running") == 1)
        queued = server.live.connect()
        queued.sendall(raw_request("/v1/completions", prompt="he", max_tokens=400, stream=stream))
        wait_for(lambda: server.metric("num_requests_waiting") == 1)
        queued.close()
        wait_for(lambda: server.metric("num_requests_waiting") == 0)
        assert server.metric("num_requests_running") == 1
        first.close()
        server.wait_until_idle()
        server.assert_works()


def test_leaving_before_the_body_has_come(server: Served) -> None:
    for _ in range(20):
        connection = server.live.connect()
        connection.sendall(raw_request("/v1/completions", prompt="hello")[:-5])
        connection.close()
    wait_for(lambda: server.live.traffic.num_in_flight == 0)


def test_a_reader_that_does_not_read_is_given_up() -> None:
    # Chunks are large by their logprobs, so that the sockets' buffers are soon full.
    options = AppOptions(send_timeout_s=0.5)
    with served(context=4096, num_pages=512, options=options, max_unread_outputs=64) as server:
        with server.live.connect() as connection:
            connection.sendall(
                raw_request(
                    "/v1/chat/completions",
                    messages=[{"role": "user", "content": "hello"}],
                    max_tokens=4000,
                    n=4,
                    logprobs=True,
                    top_logprobs=20,
                    stream=True,
                )
            )
            wait_for(lambda: server.worker.num_requests == 1)
            server.wait_until_idle(30)
            wait_for(lambda: server.live.traffic.num_in_flight == 0)
        server.assert_works()
        assert server.metric("generation_tokens_total") < 16_000
        assert server.metric("request_success_total", finished_reason="abort") == 1


def test_more_requests_than_the_queue_takes_are_refused() -> None:
    with served(step_s=STEP_S, batch=2, max_queued_requests=3) as server:
        server.runner.gate.clear()

        def ask(number: int) -> httpx.Response:
            return server.answer(f"hello {number}", max_tokens=3)

        with ThreadPoolExecutor(50) as pool:
            answers = [pool.submit(ask, number) for number in range(50)]
            wait_for(lambda: sum(answer.done() for answer in answers) >= 45, 10)
            server.runner.gate.set()
            responses = [answer.result(20) for answer in answers]
        statuses = [response.status_code for response in responses]
        assert statuses.count(200) == 5
        assert statuses.count(429) == 45
        for response in responses:
            if response.status_code == 429:
                assert 1 <= int(response.headers["retry-after"]) <= 60
                assert response.json()["error"]["code"] == "queue_full"
        assert server.metric("admission_rejections_total") == 45
        server.wait_until_idle()
        server.assert_works()


def test_the_official_client_waits_and_comes_again() -> None:
    with served(step_s=STEP_S, batch=1, max_queued_requests=0) as server:
        server.runner.gate.clear()
        threading.Timer(0.5, server.runner.gate.set).start()
        holder = threading.Thread(target=lambda: server.answer(max_tokens=2))
        holder.start()
        wait_for(lambda: server.worker.num_requests == 1)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        holder.join(10)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=3) as client:
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices


def test_overload_does_not_slow_those_who_are_in() -> None:
    with served(step_s=STEP_S, batch=4, max_queued_requests=4) as server:
        alone = time.monotonic()
        server.answer(max_tokens=5)
        alone = time.monotonic() - alone

        def ask(number: int) -> tuple[int, float]:
            started = time.monotonic()
            response = server.answer(f"hello {number}", max_tokens=5)
            return response.status_code, time.monotonic() - started

        with ThreadPoolExecutor(80) as pool:
            results = list(pool.map(ask, range(80)))
        admitted = [seconds for status, seconds in results if status == 200]
        assert len(admitted) >= 8
        assert {status for status, _ in results} == {200, 429}
        # At most two batches of four are before anybody who is admitted.
        assert max(admitted) < 3 * alone + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_not_take_for_ever(stream: bool) -> None:
    with served(step_s=STEP_S, request_timeout_s=0.3) as server:
        started = time.monotonic()
        response = server.answer(max_tokens=400, stream=stream)
        assert time.monotonic() - started < 3
        if stream:
            last = response.text.rstrip().splitlines()[-1]
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert response.status_code == 408
            error = response.json()["error"]
        assert error["code"] == "request_timeout"
        server.wait_until_idle()
        assert server.answer(max_tokens=2).status_code == 200


def test_waiting_in_the_queue_counts() -> None:
    with served(step_s=STEP_S, batch=1, request_timeout_s=0.4) as server:
        server.runner.gate.clear()
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(server.answer, "hello", 2, stream=True) for _ in range(3)]
            assert [answer.result(10).status_code for answer in answers] == [408, 408, 408]
        server.runner.gate.set()
        server.wait_until_idle()
        server.assert_works()


def test_more_tokens_than_pages_give_the_same_answers() -> None:
    prompts = [f"{letter * 20} says" for letter in "abcdefgh"]
    with served(context=256, num_pages=256) as roomy:
        alone = [roomy.answer(prompt, 100).json()["choices"][0]["text"] for prompt in prompts]
    # Together they need 8 * ceil(126 / 16) = 64 pages.
    with served(context=256, num_pages=20) as tight:
        tight.runner.gate.clear()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(tight.answer, prompt, 100) for prompt in prompts]
            wait_for(lambda: tight.worker.num_requests == 8)
            tight.runner.gate.set()
            together = [answer.result(30).json()["choices"][0]["text"] for answer in answers]
        assert together == alone
        assert tight.metric("num_preemptions_total") > 0
        tight.wait_until_idle()


def test_many_clients_that_come_and_go() -> None:
    with served(step_s=0.001, batch=8, max_queued_requests=64) as server:

        def ask(number: int) -> int:
            body = {"prompt": f"hello {number}", "max_tokens": 5 + number % 40, "stream": True}
            with server.client.stream("POST", "/v1/completions", json=body, timeout=20) as response:
                for count, _ in enumerate(response.iter_lines()):
                    if number % 3 == 0 and count > number % 7:
                        break
                return response.status_code

        with ThreadPoolExecutor(24) as pool:
            statuses = list(pool.map(ask, range(120)))
        assert set(statuses) == {200}
        server.wait_until_idle()
        server.assert_works()


def test_a_body_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlc_llm.serve.body, "BODY_TIMEOUT_S", 0.3)
    with served() as server, server.live.connect() as connection:
        connection.sendall(raw_request("/v1/completions", prompt="hello")[:-5])
        answer = read_answer(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "request_timeout"' in answer
