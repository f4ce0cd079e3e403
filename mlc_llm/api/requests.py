"""From keyword arguments, as OpenAI's clients take them, to checked requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mlc_llm.errors import RequestError

Kind = TypeVar("Kind", bound=BaseModel)


def read_request(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    """Return the request that keyword arguments describe; those of `extra_body` count as well.

    Answers of earlier requests may be part of it. Raises RequestError that names what is wrong.
    """
    values = dict(fields)
    extra = values.pop("extra_body", None) or {}
    if not isinstance(extra, Mapping):
        raise RequestError("extra_body must be a dictionary of further fields", "extra_body")
    if twice := sorted(values.keys() & extra.keys()):
        raise RequestError(f"{twice[0]} is given twice, the second time in extra_body", twice[0])
    try:
        plain = {name: _to_json(value) for name, value in {**values, **extra}.items()}
    except RecursionError:
        raise RequestError("a field is nested too deeply; send less deep objects") from None
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        from mlc_llm.serve.errors import field_error

        raise field_error(error, plain) from None


def _to_json(value: Any) -> Any:
    """Return plain lists and dictionaries in place of other sequences, mappings and answers."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value
