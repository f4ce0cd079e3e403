"""Bodies that are broken, hostile or out of bounds: refused with 400, and the server goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import (
    INTERNALS,
    MODEL,
    TOKENIZER,
    VOCAB_SIZE,
    Served,
    post,
    served,
    served_and_checked,
)

from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.prompt import PromptBuilder

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served_and_checked() as running:
        yield running


def assert_refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """Check that a refusal is OpenAI's, and says nothing of the machine; return its detail."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"] and len(error["message"]) < 3000
    assert not [word for word in INTERNALS if word in response.text]
    return error


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/embeddings", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b"\xff\xfe\x00",
        b"{}}",
        b"{'a': 1}",
        b"[" * 100_000,
        b'{"messages":' * 100_000,
    ],
    ids=lambda body: str(body[:10]),
)
def test_what_is_no_object(server: Served, path: str, body: bytes) -> None:
    assert_refused(post(server, path, body))


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "a/b/c"])
def test_content_types_that_are_not_json(server: Served, kind: str | None) -> None:
    content = json.dumps({"messages": HELLO})
    headers = {} if kind is None else {"content-type": kind}
    response = server.client.post(CHAT, content=content, headers=headers)
    assert "application/json" in assert_refused(response)["message"]


def test_a_charset_is_fine(server: Served) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    content = json.dumps({"messages": HELLO, "max_tokens": 1})
    assert server.client.post(CHAT, content=content, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hello",
        {},
        5,
        [],
        [None],
        [123],
        ["hello"],
        [[]],
        [{}],
        [{"role": "user"}],
        [{"content": "hello"}],
        [{"role": 123, "content": "hello"}],
        [{"role": "nobody", "content": "hello"}],
        [{"role": "user", "content": 123}],
        [{"role": "user", "content": {"text": "hello"}}],
        [{"role": "user", "content": [{}]}],
        [{"role": "user", "content": ["hello"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
        [{"role": "user", "content": "hello", "nonsense": 1}],
    ],
    ids=str,
)
def test_messages_of_a_wrong_shape(server: Served, messages: Any) -> None:
    error = assert_refused(post(server, CHAT, {"model": MODEL, "messages": messages}))
    assert error["param"] is None or error["param"].startswith("messages")


@pytest.mark.parametrize(
    "prompt",
    [
        *[None, "", [], [""], [[]], [-1], [10**9], [2**40], [VOCAB_SIZE], [1.5], [True], {}, 5],
        *[["a", 1], [[1], "a"], [None], [["a"]]],
    ],
    ids=str,
)
def test_prompts_that_are_none(server: Served, prompt: Any) -> None:
    assert_refused(post(server, TEXT, {"prompt": prompt}))


BOUNDS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", -1),
    ("n", 10**9),
    ("n", 1.5),
    ("n", "2"),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", 2**63),
    ("max_tokens", 10**400),
    ("max_tokens", "5"),
    ("max_tokens", 1.5),
    ("temperature", -0.1),
    ("temperature", 1e9),
    ("temperature", "hot"),
    ("temperature", [1]),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("frequency_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("seed", 2**200),
    ("seed", "x"),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop", ["x"] * 100_000),
    ("stop", "x" * 1_000_000),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", list(range(100_000))),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": "x"}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(VOCAB_SIZE): 1}),
    ("logit_bias", {"9" * 30: 1}),
    ("logit_bias", {str(number): 1 for number in range(100_000)}),
    ("logit_bias", [1]),
    ("min_tokens", -1),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("priority", 2**70),
    ("cache_salt", "x" * 100_000),
    ("cache_salt", 5),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "choice", "choice": ["a"] * 100_000}),
    ("nonsense", 1),
]


@pytest.mark.parametrize(("name", "value"), BOUNDS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_values_out_of_bounds(server: Served, path: str, name: str, value: Any) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    started = time.monotonic()
    error = assert_refused(post(server, path, {**body, name: value}))
    assert name in (error["param"] or "") or name in error["message"]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"top_logprobs": 5}),
        (CHAT, {"logprobs": True, "top_logprobs": 21}),
        (CHAT, {"logprobs": True, "top_logprobs": 10**6}),
        (CHAT, {"logprobs": 3}),
        (CHAT, {"max_tokens": 0}),
        (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}),
        (CHAT, {"min_tokens": 5, "max_tokens": 4}),
        (CHAT, {"tool_choice": "required"}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}),
        (CHAT, {"chat_template": "{{ 1 }}"}),
        (CHAT, {"chat_template_kwargs": 5}),
        (TEXT, {"logprobs": 10**6}),
        (TEXT, {"logprobs": -1}),
        (TEXT, {"best_of": 10**9}),
        (TEXT, {"best_of": 1, "n": 2}),
        (TEXT, {"best_of": 2, "n": 1, "stream": True}),
        (TEXT, {"prompt": ["hello"] * 10_000}),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_together(server: Served, path: str, fields: Any) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    assert_refused(post(server, path, {**body, **fields}))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_that_are_not_finite(server: Served, name: str, text: str) -> None:
    assert_refused(post(server, CHAT, f'{{"messages": {json.dumps(HELLO)}, "{name}": {text}}}'))


def test_a_bias_that_is_not_finite(server: Served) -> None:
    assert_refused(post(server, TEXT, '{"prompt": "a", "logit_bias": {"5": 1e999}}'))


def test_half_a_surrogate_pair(server: Served) -> None:
    body = '{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert_refused(post(server, CHAT, body))


def test_a_long_prompt_of_one_character(server: Served) -> None:
    error = assert_refused(post(server, TEXT, {"prompt": "x" * 300_000}))
    assert error["code"] == "context_length_exceeded"


def test_a_body_that_is_too_large(server: Served) -> None:
    content = b'{"prompt": "' + b"x" * (33 * 1024 * 1024) + b'"}'
    assert assert_refused(post(server, TEXT, content), 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/home/someone/secret/model",
        "a\r\nSet-Cookie: x=1",
        "a\x1b[31mred",
        "x" * 100_000,
        "",
    ],
    ids=lambda name: repr(name)[:20],
)
def test_names_of_models_are_not_echoed_raw(
    server: Served, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    response = post(server, CHAT, {"model": name, "messages": HELLO})
    error = assert_refused(response, 404 if len(name) <= 256 else 400)
    assert error["param"] == "model"
    message = error["message"]
    assert "\r" not in message and "\n" not in message and "\x1b" not in message
    assert len(message) < 400
    assert "Set-Cookie" not in "".join(response.headers)
    assert not caplog.records


def test_request_ids_cannot_write_headers_or_logs(server: Served) -> None:
    head = (
        "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        "X-Request-Id: a%0d%0aSet-Cookie: x\r\n\r\n"
    )
    answer = server.live.exchange(head.encode()).decode()
    assert "Set-Cookie" not in answer


BOMBS = {
    "loop": "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(n) %}{{ 'x' * 100000 }}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "memory": "{% set ns = namespace(a='x') %}{% for i in range(n) %}{% set ns.a = ns.a ~ ns.a %}"
    "{% endfor %}{{ ns.a }}",
    "raise": "{{ raise_exception('no such conversation') }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_templates_that_are_bombs(name: str) -> None:
    template = ChatTemplate(BOMBS[name], {}, timeout_s=1.0)
    prompts = PromptBuilder(TOKENIZER, Conversation(), template, [], VOCAB_SIZE)
    with served(prompts=prompts) as running:
        body = {"messages": HELLO, "chat_template_kwargs": {"n": 90_000}}
        started = time.monotonic()
        response = post(running, CHAT, body)
        assert_refused(response)
        assert time.monotonic() - started < 10
        # Rendering runs elsewhere: the event loop and other requests go on.
        running.assert_works()
    prompts.close()


def test_others_are_answered_while_a_template_runs() -> None:
    template = ChatTemplate(BOMBS["loop"], {}, timeout_s=2.0)
    prompts = PromptBuilder(TOKENIZER, Conversation(), template, [], VOCAB_SIZE)
    with served(prompts=prompts) as running:
        body = {"messages": HELLO, "chat_template_kwargs": {"n": 90_000}}
        statuses: list[int] = []
        bomb = threading.Thread(
            target=lambda: statuses.append(post(running, CHAT, body).status_code)
        )
        bomb.start()
        time.sleep(0.5)
        running.assert_works()
        assert bomb.is_alive()
        bomb.join(10)
        assert statuses == [400]
    prompts.close()
