"""From an exception to an HTTP status and an error body; the one place for it.

Bodies have OpenAI's shape, and Anthropic's on the paths of its API. Knows every exception that may
leave a route or a guard. Does not send anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from mlc_llm.errors import (
    AuthenticationError,
    ContextTooLong,
    EngineStopped,
    MlcError,
    OptionError,
    QueueFull,
    RequestError,
    RequestTimeout,
    StepFailed,
    TemplateError,
    UnknownModel,
)

if TYPE_CHECKING:
    from fastapi.exceptions import RequestValidationError

_MAX_MESSAGE_LEN = 2000
_MAX_VALUE_LEN = 80
_INTERNAL = "the server failed to answer this request; its log says why"

# Class -> status, type, code. The first class that fits counts.
_TABLE: tuple[tuple[type[MlcError], int, str, str | None], ...] = (
    (ContextTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (AuthenticationError, 401, "invalid_request_error", "invalid_api_key"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (RequestTimeout, 408, "timeout_error", "request_timeout"),
    (StepFailed, 500, "server_error", "step_failed"),
    (EngineStopped, 503, "server_error", "engine_stopped"),
    (RequestError, 400, "invalid_request_error", None),
    (OptionError, 400, "invalid_request_error", None),
    (TemplateError, 400, "invalid_request_error", None),
)
# Status -> type, code, for errors that HTTP itself has names for.
_OF_STATUS: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "bad_request"),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "body_too_large"),
    431: ("invalid_request_error", "headers_too_large"),
    503: ("server_error", "unavailable"),
}
# What Anthropic calls errors of a status; others are those of 400 and of 500.
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_PATH = "/v1/messages"


class ErrorDetail(BaseModel):
    """What went wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong, for programs and for people."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """The body of every answer of Anthropic's API that is not a success."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail


@dataclass(frozen=True)
class Failure:
    """An answer that says why a request was not served."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The body as OpenAI's clients expect it."""
        detail = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": detail}

    @property
    def body_bytes(self) -> bytes:
        """The body as sent."""
        return _encode(self.body)

    @property
    def anthropic_body_bytes(self) -> bytes:
        """The body as Anthropic's clients expect it."""
        usual = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status, usual)
        # There is no other place to name a field.
        is_named = self.param is None or self.param in self.message
        message = self.message if is_named else f"{self.param}: {self.message}"
        return _encode({"type": "error", "error": {"type": kind, "message": message}})

    def body_bytes_for(self, path: str) -> bytes:
        """Return the body in the shape of the API that a path belongs to."""
        is_theirs = path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")
        return self.anthropic_body_bytes if is_theirs else self.body_bytes


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def failure_of_status(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> Failure:
    """Return the failure for an HTTP status that needs no exception of ours."""
    kind, code = _OF_STATUS.get(
        status, ("server_error" if status >= 500 else "invalid_request_error", None)
    )
    return Failure(status, sanitize(message), kind, code, headers=headers or {})


def failure_of(error: BaseException) -> Failure:
    """Return what a client is told of an exception; nothing of the inside of unexpected ones."""
    # Engines in Python import this module, without the server's packages.
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    if isinstance(error, ValidationError | RequestValidationError):
        error = field_error(error, {})
    if isinstance(error, HTTPException):
        return failure_of_status(error.status_code, str(error.detail), error.headers)
    for kind, status, type_name, code in _TABLE:
        if isinstance(error, kind):
            return Failure(
                status,
                sanitize(str(error)),
                type_name,
                code,
                param=_param_of(error),
                headers=_headers_of(error),
            )
    return Failure(500, _INTERNAL, "server_error", "internal_error")


def _param_of(error: MlcError) -> str | None:
    if isinstance(error, RequestError) and error.param is not None:
        return sanitize(error.param)
    return "model" if isinstance(error, UnknownModel) else None


def _headers_of(error: MlcError) -> dict[str, str]:
    if isinstance(error, QueueFull):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, EngineStopped):
        return {"retry-after": "1"}
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    return {}


def field_error(error: ValidationError | RequestValidationError, root: Any) -> RequestError:
    """Return what pydantic found wrong in the object `root`, as an error that names the field.

    The first fault is told. A value that fits no member of a union is reported once a member; the
    deepest place says most.
    """
    errors: Sequence[Any] = error.errors()
    first: Any = max(errors, key=lambda fault: len(fault["loc"]), default={})
    param = name_of_place(first.get("loc", ()), root)
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, RequestError) and reason.param is not None:
        return reason
    message = str(reason if isinstance(reason, Exception) else first.get("msg", "not valid"))
    if "input" in first and first.get("type") not in ("missing", "value_error"):
        message += f", not {_show(first['input'])}"
    return RequestError(f"{param}: {message}" if param else message, param=param or None)


def name_of_place(place: Sequence[int | str], root: Any) -> str:
    """Return a place in an object as OpenAI writes it: `messages[0].content`.

    Steps that are not in the object, but name a member of a union, are left out.
    """
    name, here = "", root
    for number, step in enumerate(place):
        if isinstance(step, int) and isinstance(here, list):
            name += f"[{step}]"
            here = here[step] if 0 <= step < len(here) else None
        elif isinstance(here, Mapping) and (step in here or number == len(place) - 1):
            name += f".{step}" if name else str(step)
            here = here.get(step)
    return name


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=lambda other: type(other).__name__)
    return text if len(text) <= _MAX_VALUE_LEN else text[:_MAX_VALUE_LEN] + "..."


# A path of at least two parts that starts at a root, a drive or a home directory.
_PATH = re.compile(r"(?<![\w:/.~])(?:~|\.\.?|[A-Za-z]:)?(?:[\\/][\w.+@ -]*[\w.+@-]){2,}[\\/]?")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


def sanitize(text: str) -> str:
    """Return a message without paths of this machine, addresses and control characters."""
    text = _CONTROL.sub(" ", text[: 2 * _MAX_MESSAGE_LEN])
    text = _ADDRESS.sub("[address]", _PATH.sub("[path]", text))
    return text if len(text) <= _MAX_MESSAGE_LEN else text[:_MAX_MESSAGE_LEN] + "..."
