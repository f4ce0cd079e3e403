"""Bodies for agents' routes that are broken, hostile or random: refused in the API's own shape."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from random_requests import random_fields, random_value
from served import INTERNALS, Served, post, served_and_checked

from mlc_llm.serve.protocol.anthropic import CountTokensRequest, MessagesRequest
from mlc_llm.serve.protocol.responses import ResponseRequest
from mlc_llm.serve.rerank import RerankRequest

RESPONSES, MESSAGES, COUNT, RERANK = (
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
)
HELLO = [{"role": "user", "content": "hello"}]
GOOD: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "hello", "max_output_tokens": 2},
    MESSAGES: {"messages": HELLO, "max_tokens": 2},
    COUNT: {"messages": HELLO},
    RERANK: {"query": "a", "documents": ["a"]},
}
KINDS: dict[str, type[BaseModel]] = {
    RESPONSES: ResponseRequest,
    MESSAGES: MessagesRequest,
    COUNT: CountTokensRequest,
    RERANK: RerankRequest,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served_and_checked() as running:
        yield running


def assert_refused(path: str, response: httpx.Response, statuses: tuple[int, ...] = (400,)) -> str:
    """Check that a refusal has the shape of its API and says nothing of the machine."""
    assert response.status_code in statuses, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    if path.startswith(MESSAGES):
        assert body.keys() == {"type", "error"} and body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
    if response.status_code == 400:
        assert body["error"]["type"] == "invalid_request_error"
    message: str = body["error"]["message"]
    assert message and len(message) < 3000
    assert not [word for word in INTERNALS if word in response.text]
    return message


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{bad", b"\xff\xfe", b'{"input": NaN}', b"[" * 100_000, b'{"a":' * 9999],
    ids=lambda body: str(body[:10]),
)
def test_what_is_no_object(server: Served, path: str, body: bytes) -> None:
    assert_refused(path, post(server, path, body))


@pytest.mark.parametrize("path", GOOD)
def test_fields_that_are_not_known(server: Served, path: str) -> None:
    assert "nonsense" in assert_refused(path, post(server, path, {**GOOD[path], "nonsense": 1}))


@pytest.mark.parametrize("path", GOOD)
def test_names_of_other_models(server: Served, path: str) -> None:
    for name in ("other", "../../etc/passwd", "a\r\nb"):
        response = post(server, path, {**GOOD[path], "model": name})
        message = assert_refused(path, response, (404,))
        assert "\r" not in message
    assert_refused(path, post(server, path, {**GOOD[path], "model": 5}))


ITEM = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    (RESPONSES, {"input": [HELLO[0]] * 5000}),
    (RESPONSES, {"input": [{**HELLO[0], "content": [{"type": "input_text", "text": "a"}] * 5000}]}),
    (RESPONSES, {"input": [{**ITEM, "call_id": "x" * 1000}]}),
    (RESPONSES, {"input": [{**ITEM, "arguments": {"a": 1}}]}),
    (RESPONSES, {"input": [{"type": ["message"], "role": "user", "content": "a"}]}),
    (RESPONSES, {"input": [{"type": {"a": 1}, "role": {}, "content": "a"}]}),
    (RESPONSES, {"tools": [TOOL] * 200}),
    (RESPONSES, {"tools": [{**TOOL, "name": "x" * 100_000}]}),
    (RESPONSES, {"tools": [{**TOOL, "parameters": nested(90)}]}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n", "schema": nested(90)}}}),
    (RESPONSES, {"metadata": {"a" * 65: "b"}}),
    (RESPONSES, {"max_output_tokens": 10**400}),
    (MESSAGES, {"messages": HELLO * 5000}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]}),
    (MESSAGES, {"messages": [{"role": ["user"], "content": "a"}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]}),
    (MESSAGES, {"messages": [{"role": "assistant", "content": "a"}]}),
    (MESSAGES, {"stop_sequences": ["x" * 100_000]}),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": nested(90)}]}),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "array"}}]}),
    (MESSAGES, {"max_tokens": True}),
    (MESSAGES, {"system": [{"type": "image"}]}),
    (COUNT, {"max_tokens": 5}),
    (COUNT, {"stream": True}),
    (RERANK, {"documents": ["a"] * 100_000}),
    (RERANK, {"documents": [nested(90)]}),
    (RERANK, {"top_n": 2**70}),
]


@pytest.mark.parametrize(("path", "fields"), HOSTILE, ids=lambda value: str(value)[:50])
def test_what_is_out_of_bounds(server: Served, path: str, fields: dict[str, Any]) -> None:
    started = time.monotonic()
    response = post(server, path, {**GOOD[path], **fields})
    assert_refused(path, response)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", GOOD)
def test_random_fields_never_break_the_server(server: Served, path: str) -> None:
    draw = random.Random(path)
    num_answers = 0
    for _ in range(150):
        fields = random_fields(draw, KINDS[path])
        name = "input" if path == RESPONSES else "messages"
        if path != RERANK and draw.random() < 0.3:
            parts = [random_value(draw) for _ in range(2)]
            role = draw.choice(["user", "assistant", "system"])
            fields[name] = [{"type": "message", "role": role, "content": parts}, *HELLO]
        body = json.dumps({**GOOD[path], **fields}).encode()  # NaN and lone surrogates as they are
        response = post(server, path, body)
        if response.status_code != 200:
            assert_refused(path, response, (400, 404))
        else:
            num_answers += 1
    assert num_answers > 0 or path == RERANK
