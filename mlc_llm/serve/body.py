"""The body of a request: read within limits, parsed as strict JSON, checked against its type.

Knows no route. The limit on its length is kept by `guard.SizeLimits`.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from mlc_llm.errors import RequestError, RequestTimeout
from mlc_llm.serve.errors import field_error

# Seconds in which a client has to send its body.
BODY_TIMEOUT_S = 30.0

_Body = TypeVar("_Body", bound=BaseModel)


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """Read the body of a request as `kind`.

    Raises RequestError that names the field at fault, RequestTimeout where the body does not come,
    and starlette's ClientDisconnect.
    """
    _require_json(request)
    try:
        data = await asyncio.wait_for(request.body(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise RequestTimeout(
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s; send it again"
        ) from None
    values = parse_object(data)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise field_error(error, values) from None


def _require_json(request: Request) -> None:
    # Browsers send JSON to other sites only after asking the server: this refusal keeps them out.
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        shown = repr(content_type[:80]) if content_type else "missing"
        raise RequestError(f"the content-type is {shown}; it must be application/json")


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises RequestError, for numbers that are no JSON (NaN) too.

    The parser refuses more than 200 levels of lists and objects.
    """
    try:
        values = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    return values
