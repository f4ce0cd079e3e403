"""Exceptions become statuses and bodies in OpenAI's shape, and tell nothing of the machine."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from mlc_llm.errors import (
    AuthenticationError,
    ContextTooLong,
    DeviceError,
    EngineStopped,
    OptionError,
    QueueFull,
    RequestError,
    RequestTimeout,
    StepFailed,
    TemplateError,
    UnknownModel,
)
from mlc_llm.serve.body import parse_object
from mlc_llm.serve.errors import failure_of, field_error, sanitize


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (RequestError("m", "n"), 400, "invalid_request_error", None),
        (OptionError("m"), 400, "invalid_request_error", None),
        (TemplateError("m"), 400, "invalid_request_error", None),
        (ContextTooLong("m"), 400, "invalid_request_error", "context_length_exceeded"),
        (AuthenticationError("m"), 401, "invalid_request_error", "invalid_api_key"),
        (UnknownModel("m"), 404, "invalid_request_error", "model_not_found"),
        (RequestTimeout("m"), 408, "timeout_error", "request_timeout"),
        (QueueFull("m"), 429, "rate_limit_error", "queue_full"),
        (StepFailed("m"), 500, "server_error", "step_failed"),
        (EngineStopped("m"), 503, "server_error", "engine_stopped"),
        (HTTPException(404), 404, "invalid_request_error", "not_found"),
        (HTTPException(405), 405, "invalid_request_error", "method_not_allowed"),
    ],
)
def test_status_of_errors(error: Exception, status: int, kind: str, code: str | None) -> None:
    failure = failure_of(error)
    assert (failure.status, failure.type, failure.code) == (status, kind, code)
    body = json.loads(failure.body_bytes)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("m", "n"), "invalid_request_error"),
        (AuthenticationError("m"), "authentication_error"),
        (HTTPException(403), "permission_error"),
        (UnknownModel("m"), "not_found_error"),
        (HTTPException(405), "invalid_request_error"),
        (RequestTimeout("m"), "timeout_error"),
        (HTTPException(413), "request_too_large"),
        (QueueFull("m"), "rate_limit_error"),
        (StepFailed("m"), "api_error"),
        (EngineStopped("m"), "overloaded_error"),
    ],
)
def test_errors_as_anthropic_calls_them(error: Exception, kind: str) -> None:
    failure = failure_of(error)
    # A field has no place of its own there: the message names it.
    message = failure.message if failure.param is None else f"{failure.param}: {failure.message}"
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = json.loads(failure.body_bytes_for(path))
        assert body == {"type": "error", "error": {"type": kind, "message": message}}
    assert failure.body_bytes_for("/v1/chat/completions") == failure.body_bytes


@pytest.mark.parametrize(
    "error", [KeyError("/etc/passwd"), ValueError("secret"), DeviceError("/dev/x is broken")]
)
def test_unexpected_errors_tell_nothing(error: Exception) -> None:
    failure = failure_of(error)
    assert (failure.status, failure.code) == (500, "internal_error")
    assert str(error).strip("'") not in failure.message


def test_a_full_queue_says_when_to_come_again() -> None:
    assert failure_of(QueueFull("m", 2.3)).headers == {"retry-after": "3"}
    assert failure_of(QueueFull("m", 0.0)).headers == {"retry-after": "1"}


def test_the_field_at_fault_is_named() -> None:
    assert failure_of(RequestError("m", "top_p")).param == "top_p"
    assert failure_of(UnknownModel("m")).param == "model"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["user", "system"]
    content: str | list[Part]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    messages: list[Message]
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)


def fault_in(values: dict[str, object]) -> RequestError:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(values)
    return field_error(caught.value, values)


@pytest.mark.parametrize(
    ("values", "param", "part_of_message"),
    [
        ({}, "messages", "required"),
        ({"messages": "hi"}, "messages", '"hi"'),
        ({"messages": [1]}, "messages[0]", "not 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role", "'user' or 'system'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "not 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages[0].content[0].text",
            "null",
        ),
        ({"messages": [], "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"messages": [], "temperature": float("inf")}, "temperature", "finite"),
        ({"messages": [], "temprature": 1}, "temprature", "not permitted"),
    ],
)
def test_faults_name_the_field_as_openai_does(
    values: dict[str, object], param: str, part_of_message: str
) -> None:
    error = fault_in(values)
    assert error.param == param
    assert str(error).startswith(f"{param}: ")
    assert part_of_message in str(error)


def test_long_values_are_cut() -> None:
    assert len(str(fault_in({"messages": "x" * 100_000}))) < 300


@pytest.mark.parametrize(
    "text",
    [
        "cannot open /home/user/models/a.bin now",
        r"cannot open C:\Users\me\a.bin now",
        "cannot open ~/models/secret now",
        "cannot open ../../etc/passwd/x now",
    ],
)
def test_paths_are_taken_out(text: str) -> None:
    cleaned = sanitize(text)
    for part in ("home", "user", "Users", "secret", "passwd"):
        assert part not in cleaned
    assert cleaned.startswith("cannot open")


def test_addresses_and_control_characters_are_taken_out() -> None:
    cleaned = sanitize("bad <object at 0x7f00deadbeef>\r\nSet-Cookie: a\x1b[31m\u2028 b")
    assert "0x7f" not in cleaned
    assert not any(ord(character) < 32 or character == "\u2028" for character in cleaned)
    assert len(sanitize("x" * 10_000)) < 2100


def test_ordinary_text_stays_as_it_is() -> None:
    for text in (
        "the model 'HF://user/repo' is not served here",
        "temperature must be a number from 0 to 2, is 3.5",
        "use and/or leave out 1/2",
    ):
        assert sanitize(text) == text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{bad",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\\ud800"}',
        b'{"a": 1} {"b": 2}',
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError, match="the body"):
        parse_object(data)


def test_moderate_nesting_is_json() -> None:
    assert parse_object(b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}")["a"]
