"""One measured request: what is sent, what is understood of the answer, and what can go wrong."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from typing import Any

import pytest

from mlc_llm.bench.load.ask import Asker, Endpoint, Record, Sample, call
from mlc_llm.bench.load.http import RequestFailed, Server
from mlc_llm.errors import OptionError

from .fake_openai import OVERHEAD, FakeOpenAI


def ask(
    fake: FakeOpenAI,
    sample: Sample | None = None,
    endpoint: Endpoint = "chat",
    timeout_s: float = 10.0,
    api_key: str | None = None,
) -> Record:
    asker = Asker(Server.parse(fake.url, api_key), endpoint, "fake", timeout_s, {"seed": 5})
    return asyncio.run(asker.ask(sample or Sample("one two three", 4)))


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_answer_is_timed_and_counted(endpoint: Endpoint, framing: str) -> None:
    with FakeOpenAI(framing=framing, event_delay_s=0.005) as fake:
        record = ask(fake, endpoint=endpoint)
    assert record.error is None
    assert record.output_tokens == len(record.text_times) == 4
    assert record.prompt_tokens == 3 + (OVERHEAD if endpoint == "chat" else 0)
    assert record.cached_tokens == 3
    assert record.is_counted
    times = [record.sent_s, *record.text_times]
    assert all(later - earlier >= 0.004 for earlier, later in itertools.pairwise(times))
    assert record.end_s >= times[-1]
    assert record.text == "a a a a "


def test_the_body_is_what_openai_documents() -> None:
    with FakeOpenAI() as fake:
        ask(fake)
        ask(fake, endpoint="completions")
    common = {
        "model": "fake",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 5,
    }
    message = {"role": "user", "content": "one two three"}
    assert fake.bodies == [
        {**common, "messages": [message]},
        {**common, "prompt": "one two three"},
    ]


def test_a_chat_has_earlier_turns_and_a_completion_has_not() -> None:
    sample = Sample("third", 1, ("first", "second"))
    with FakeOpenAI() as fake:
        ask(fake, sample)
        with pytest.raises(ValueError):
            ask(fake, sample, "completions")
    [body] = fake.bodies
    roles = [(message["role"], message["content"]) for message in body["messages"]]
    assert roles == [("user", "first"), ("assistant", "second"), ("user", "third")]


def test_times_are_derived_from_moments() -> None:
    record = Record(10.0, 12.0, [10.5, 11.0, 11.75], output_tokens=4)
    assert record.ttft_s == 0.5
    assert record.tpot_s == 0.5
    assert record.gaps_s == [0.5, 0.75]
    assert record.latency_s == 2.0
    nothing = Record(10.0, 12.0)
    assert nothing.ttft_s is None and nothing.tpot_s is None and nothing.gaps_s == []


def test_without_usage_events_are_counted() -> None:
    with FakeOpenAI(has_usage=False) as fake:
        record = ask(fake)
    assert record.output_tokens == 4
    assert not record.is_counted


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"status": 429}, "HTTP 429", "refused with 429"),
        ({"api_key": "sesame"}, "HTTP 401", "wrong key"),
        ({"ending": ""}, "connection lost", "without [DONE]"),
        ({"ending": "data: {\n\n"}, "bad answer", "no JSON"),
        ({"ending": "data: 5\n\n"}, "bad answer", "no object"),
        ({"ending": 'data: {"error": {"message": "it broke"}}\n\n'}, "error in stream", "it broke"),
    ],
)
def test_failures_have_a_kind(changes: dict[str, Any], kind: str, detail: str) -> None:
    with FakeOpenAI(**changes) as fake:
        record = ask(fake)
    assert record.error == kind
    assert detail in record.detail


def test_a_slow_answer_is_given_up() -> None:
    with FakeOpenAI(event_delay_s=0.5) as fake:
        record = ask(fake, timeout_s=0.1)
    assert record.error == "timeout"
    assert 0.1 <= record.latency_s < 0.4


def test_the_key_is_sent() -> None:
    with FakeOpenAI(api_key="sesame") as fake:
        assert ask(fake, api_key="sesame").error is None


def answer_with(data: bytes) -> RequestFailed:
    """Return how a request fails at a server that sends `data` and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        server = Server.parse(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(RequestFailed) as caught:
            asyncio.run(call(server, "/x"))
        thread.join()
    return caught.value


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "connection lost"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "connection lost"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "connection lost"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "connection lost"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "bad answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "bad answer"),
        (b"HTTP/1.1 two OK\r\n\r\n", "bad answer"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "bad answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\n\r\n", "HTTP 503"),
    ],
)
def test_broken_http_is_a_failure_like_others(data: bytes, kind: str) -> None:
    assert answer_with(data).kind == kind


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RequestFailed, match="cannot connect: nothing listens there"):
        asyncio.run(call(Server.parse(f"http://127.0.0.1:{port}"), "/x"))


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix", "root"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "/v1", ""),
        ("http://127.0.0.1:8000/v1/", "127.0.0.1", 8000, "/v1", ""),
        ("https://example.org/api", "example.org", 443, "/api/v1", "/api"),
        ("http://[::1]", "::1", 80, "/v1", ""),
    ],
)
def test_urls(url: str, host: str, port: int, prefix: str, root: str) -> None:
    server = Server.parse(url)
    assert (server.host, server.port, server.prefix, server.root) == (host, port, prefix, root)
    assert (server.tls is not None) == url.startswith("https")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://x", "is not a URL like"),
        ("http://", "is not a URL like"),
        ("http://x:99999", "has a port"),
        ("http://x/?a=b", "leave the rest out"),
        ("http://a:b@x", "leave the rest out"),
    ],
)
def test_bad_urls_are_refused(url: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Server.parse(url)


def test_a_key_that_no_header_holds_is_refused() -> None:
    with pytest.raises(OptionError, match="--api-key"):
        Server.parse("http://x", "two\nlines")
