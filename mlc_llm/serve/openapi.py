"""What the routes take and send, for `/openapi.json` and `/docs`.

Bodies are read and checked by `body.read_body`, not by FastAPI, so they are described here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mlc_llm.serve.errors import AnthropicErrorResponse, ErrorResponse

_REF = "#/components/schemas/{model}"
_MEANINGS = {
    400: "The request is not valid; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The server does not answer for this Host.",
    404: "There is no such model.",
    408: "The request took too long.",
    413: "The body is too large.",
    429: "Too many requests wait; `Retry-After` says when to come again.",
    431: "Path and headers are too large.",
    500: "The server failed to answer the request.",
    503: "The engine has stopped, or the server is shutting down.",
}
# What any route may answer, and what those with a body may answer beside it.
_ALWAYS = (401, 403, 431, 500, 503)
_WITH_BODY = (*_ALWAYS, 400, 404, 408, 413, 429)


def describe(
    success: type[BaseModel] | str,
    body: type[BaseModel] | None = None,
    *,
    chunk: type[BaseModel] | None = None,
    api: Literal["openai", "responses", "anthropic"] = "openai",
    also: Iterable[int] = (),
    parameters: list[dict[str, Any]] | None = None,
    needs_key: bool = True,
) -> dict[str, Any]:
    """Return the `openapi_extra` of a route.

    success: the answer's type, or its media type where that is not JSON. chunk: what the events of
    a stream are. api: which decides how events and errors are written. also: further statuses.
    needs_key: whether an API key, if there is one, is asked for.
    """
    content: dict[str, Any] = {}
    if isinstance(success, str):
        content[success] = {"schema": {"type": "string"}}
    else:
        content["application/json"] = {"schema": _reference(success)}
    if chunk is not None:
        content["text/event-stream"] = {"schema": _events(chunk, is_named=api != "openai")}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    statuses = {*(_WITH_BODY if body is not None else _ALWAYS), *also}
    if not needs_key:
        statuses.remove(401)
    error = AnthropicErrorResponse if api == "anthropic" else ErrorResponse
    for status in sorted(statuses):
        responses[str(status)] = {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": _reference(error)}},
        }
    described: dict[str, Any] = {"responses": responses}
    if body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(body)}},
        }
    if not needs_key:
        described["security"] = []
    if parameters is not None:
        described["parameters"] = parameters
    return described


def _events(chunk: type[BaseModel], *, is_named: bool) -> dict[str, Any]:
    """Return the schema of one event of a stream, by the names of its lines."""
    text = f"Events `data: {{json}}`, each a {chunk.__name__}, then `data: [DONE]`."
    if is_named:
        text = f"Events `event: {{type}}` with `data: {{json}}`, each a {chunk.__name__}."
    names = ["event", "data"] if is_named else ["data"]
    lines = {name: {"type": "string"} for name in names}
    return {"type": "object", "description": text, "properties": lines, "required": names}


def _reference(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=kind.__name__)}


def add_schemas(
    app: FastAPI,
    bodies: Iterable[type[BaseModel]],
    answers: Iterable[type[BaseModel]],
    *,
    has_key: bool,
) -> None:
    """Put the schemas that routes refer to, and the kind of key, into the app's description."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make()
            shown: list[type[BaseModel]] = [*answers, ErrorResponse, AnthropicErrorResponse]
            kinds: list[tuple[type[BaseModel], Any]] = [(kind, "validation") for kind in bodies]
            kinds += [(kind, "serialization") for kind in shown]
            definitions = models_json_schema(kinds, ref_template=_REF)[1].get("$defs", {})
            components = schema.setdefault("components", {})
            components["schemas"] = definitions
            if has_key:
                components["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"},
                    "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                }
                schema["security"] = [{"key": []}, {"x_api_key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
