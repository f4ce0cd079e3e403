"""Keys, hosts, bodies and heads of requests, over real connections."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live_server, read_all
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mlc_llm.errors import OptionError
from mlc_llm.serve import http_protocol
from mlc_llm.serve.gate import Gate, Traffic
from mlc_llm.serve.guard import MAX_HEAD_BYTES, HostGuard, KeyGuard, SizeLimits
from mlc_llm.serve.options import LOOPBACK_HOSTS, AppOptions, parse_list

KEY = "sk-secret"
MAX_BYTES = 1000


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"length": len(await request.body())})


def guarded(traffic: Traffic) -> Any:
    app: Any = Starlette(
        routes=[
            Route(path, echo, methods=["GET", "POST", "OPTIONS"])
            for path in ("/health", "/v1/models", "/other")
        ]
    )
    app = SizeLimits(app, MAX_BYTES)
    app = KeyGuard(app, KEY)
    app = HostGuard(app, LOOPBACK_HOSTS)
    return Gate(app, traffic)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    traffic = Traffic()
    with live_server(guarded(traffic), traffic=traffic) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    detail: dict[str, Any] = response.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    return detail


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_in(answer: bytes) -> dict[str, Any]:
    detail: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return detail


def test_the_key_opens(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    response = client.get("/v1/models", headers={"authorization": f"Basic {basic}"})
    assert response.status_code == 200
    assert client.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200
    both = {"x-api-key": KEY, **bearer(KEY)}
    assert client.get("/v1/models", headers=both).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(KEY + "x"),
        bearer(KEY[:-1]),
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Basic !!!"},
        {"x-api-key": "wrong"},
        {"x-api-key": f"Bearer {KEY}"},
        {"x-api-key": KEY, **bearer("wrong")},
        {"x-api-key": "wrong", **bearer(KEY)},
    ],
)
def test_without_the_key_nothing_is_answered(client: httpx.Client, headers: dict[str, str]) -> None:
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert KEY not in response.text
    assert response.headers["www-authenticate"] == "Bearer"


def test_two_keys_are_no_key(client: httpx.Client) -> None:
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
    assert client.get("/v1/models", headers=headers).status_code == 401
    headers = [("x-api-key", KEY), ("x-api-key", KEY)]
    assert client.get("/v1/models", headers=headers).status_code == 401


def test_refusals_have_the_shape_of_the_api_they_are_for(client: httpx.Client) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = client.post(path, json={})
        assert response.status_code == 401
        body = response.json()
        assert body.keys() == {"type", "error"} and body["type"] == "error"
        assert body["error"]["type"] == "authentication_error" and body["error"]["message"]
        body = client.post(path, content=b"x" * (MAX_BYTES + 1), headers=bearer(KEY)).json()
        assert body["error"]["type"] == "request_too_large"
        body = client.post(path, json={}, headers={"host": "evil.example", **bearer(KEY)}).json()
        assert body["error"]["type"] == "permission_error"
    assert error_of(client.post("/v1/messagesx", json={}))["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/other", "/", "/docs", "/metrics", "//health", "/health/"])
def test_every_path_but_health_asks_for_the_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 401


def test_health_is_open(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200


def test_browsers_are_asked_for_the_key_of_a_page(client: httpx.Client) -> None:
    assert client.get("/").headers["www-authenticate"].startswith("Basic")


def test_options_needs_the_key(client: httpx.Client) -> None:
    assert client.options("/v1/models").status_code == 401


@pytest.mark.parametrize(
    "head",
    [
        "GET /v1/models HTTP/1.1\r\nHost: localhost/health?x\r\n",
        "GET /v1/models?/health HTTP/1.1\r\nHost: 127.0.0.1/health\r\n",
        "GET //v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        "GET /health/../v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        "GET /v1/models%3f/health HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        "GET http://127.0.0.1/v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        "GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Original-URL: /health\r\n",
        "GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Forwarded-Prefix: /health\r\n",
    ],
)
def test_no_spelling_of_a_request_avoids_the_key(server: LiveServer, head: str) -> None:
    answer = server.exchange(f"{head}Connection: close\r\n\r\n".encode())
    assert status_of(answer) in (401, 403)


def test_key_that_cannot_be_sent_is_refused() -> None:
    for key in ("", " ", " key", "key\n", "ключ"):
        with pytest.raises(OptionError, match="API key"):
            AppOptions(api_key=key)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000"])
def test_hosts_of_this_machine_are_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil", "::1"]
)
def test_other_hosts_are_not(client: httpx.Client, host: str) -> None:
    response = client.get("/health", headers={"host": host})
    assert response.status_code == 403
    assert error_of(response)["code"] == "forbidden"
    assert "evil" not in response.text


def test_a_body_within_the_limit_is_taken(client: httpx.Client) -> None:
    response = client.post("/other", content=b"x" * MAX_BYTES, headers=bearer(KEY))
    assert response.json() == {"length": MAX_BYTES}


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 3_000_000])
def test_a_larger_body_is_refused(client: httpx.Client, length: int) -> None:
    response = client.post("/other", content=b"x" * length, headers=bearer(KEY))
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_pieces_of_a_body_are_counted(client: httpx.Client) -> None:
    pieces = (b"x" * 100 for _ in range(200))
    response = client.post("/other", content=pieces, headers=bearer(KEY))
    assert response.status_code == 413


def test_an_announced_length_is_enough_to_be_refused(server: LiveServer) -> None:
    with server.connect() as connection:
        head = f"POST /other HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        assert status_of(connection.recv(65536)) == 413


@pytest.mark.parametrize("length", [MAX_HEAD_BYTES, 10_000_000])
def test_a_large_header_is_refused(server: LiveServer, length: int) -> None:
    with server.connect() as connection:
        head = (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Large: "
            + b"x" * length
        )
        try:
            connection.sendall(head + b"\r\n\r\n")
        except OSError:
            assert length > MAX_HEAD_BYTES  # closed before all was sent
        try:
            answer = read_all(connection)
        except ConnectionResetError:
            assert length == 10_000_000
            return
    assert status_of(answer) == 431
    assert error_in(answer)["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_get_an_answer(server: LiveServer, data: bytes) -> None:
    answer = server.exchange(data)
    assert status_of(answer) == 400
    assert error_in(answer)["type"] == "invalid_request_error"


def test_a_head_must_come_in_time(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    for beginning in (b"", b"GET / HTTP/1.1\r\nHost:"):
        answer = server.exchange(beginning)
        assert status_of(answer) == 408


def test_the_head_of_a_second_request_must_come_in_time(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of(connection.recv(65536)) == 200
        connection.sendall(b"GET /heal")
        assert status_of(read_all(connection)) == 408


def test_connections_are_limited(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 3)
    held: list[socket.socket] = []
    try:
        answers = []
        for _ in range(6):
            held.append(server.connect())
            held[-1].settimeout(0.2)
            try:
                answers.append(status_of(held[-1].recv(65536)))
            except TimeoutError:
                answers.append(0)
        assert answers.count(503) >= 2
        assert answers[0] == 0
    finally:
        for connection in held:
            connection.close()
    monkeypatch.undo()
    time.sleep(0.05)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_request_ids_are_taken_over_or_made(client: httpx.Client) -> None:
    given = client.get("/health", headers={"x-request-id": "abc-1.2:3"})
    assert given.headers["x-request-id"] == "abc-1.2:3"
    for unfit in ("a b", "x" * 129, "{}"):
        made = client.get("/health", headers={"x-request-id": unfit})
        assert made.headers["x-request-id"] not in ("", unfit)
    first, second = (client.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_lists_of_options() -> None:
    assert parse_list("--allow-origins", '["http://a", "http://b"]') == ["http://a", "http://b"]
    for text in ("*", "{}", "[1]", '[""]', "[", "null"):
        with pytest.raises(OptionError, match="--allow-origins"):
            parse_list("--allow-origins", text)
