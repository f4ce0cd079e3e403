"""Answers as OpenAI's package reads them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def strictly(kind: type[BaseModel], answer: BaseModel) -> Any:
    """Return an answer as OpenAI's package reads its JSON, all types and fields checked."""
    text = answer.model_dump_json()
    parsed = kind.model_validate_json(text, strict=True)
    assert not unknown_fields(parsed), text
    return parsed


def unknown_fields(value: Any) -> list[str]:
    """Return the fields of an answer, at any depth, that OpenAI's types do not have."""
    if isinstance(value, BaseModel):
        found = list(value.model_extra or {})
        return found + [name for item in vars(value).values() for name in unknown_fields(item)]
    if isinstance(value, list):
        return [name for item in value for name in unknown_fields(item)]
    return []
