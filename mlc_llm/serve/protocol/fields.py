"""Bodies that know more fields than they honour: others are refused by name, or without effect.

Which fields those are is said in tables, one for each protocol. Also, which class an object has.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Discriminator, Field, create_model, model_validator

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import RequestBody

_MAX_NAME_LEN = 80

# Field -> why any value is taken: the answer is the same with it as without.
WithoutEffect = Mapping[str, str]
# Field -> values by which nothing is asked for (null always is one), why others are refused.
Refused = Mapping[str, tuple[tuple[Any, ...], str]]


class CheckedBody(RequestBody):
    """A body with the fields of two tables; see `with_fields`."""

    refused: ClassVar[Refused] = {}

    @classmethod
    def refuse_unsupported(cls, values: Mapping[str, Any]) -> None:
        """Raise RequestError for a field that would change the answer and is not supported.

        A field of a table that a class declares itself is one that it supports.
        """
        for name, (harmless, reason) in cls.refused.items():
            if cls.model_fields[name].annotation is not Any:
                continue
            value = values.get(name)
            if value is None or any(_is_same(value, other) for other in harmless):
                continue
            raise RequestError(f"{name} is not supported with this value: {reason}", name)

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name not in cls.model_fields:
                    raise _unknown(str(name)[:_MAX_NAME_LEN], list(cls.model_fields))
            cls.refuse_unsupported(values)
        return values


def with_fields(
    name: str,
    without_effect: WithoutEffect,
    refused: Refused,
    base: type[CheckedBody] = CheckedBody,
) -> Any:
    """Return a class of this name, derived from `base`, that has the fields of both tables."""
    fields: dict[str, Any] = {}
    for field, reason in without_effect.items():
        fields[field] = (Any, Field(None, description=f"Without effect: {reason}."))
    for field, (harmless, reason) in refused.items():
        taken = ", ".join(["null", *(repr(value) for value in harmless)])
        fields[field] = (Any, Field(None, description=f"Only {taken}: {reason}."))
    made = create_model(name, __base__=base, **fields)
    made.refused = refused
    return made


def choose_class(
    tags: Mapping[str, str],
    message: str,
    key: str = "type",
    usual: Callable[[Any], str] | None = None,
) -> Any:
    """Return what chooses an object's class by the value of its key, and refuses other values.

    tags: the class's `Tag` by the value. message: what is said of others. usual: the value where
    there is none.
    """

    def find_tag(value: Any) -> str | None:
        found = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        if found is None and usual is not None:
            found = usual(value)
        return tags.get(found) if isinstance(found, str) else None

    return Discriminator(find_tag, custom_error_type=f"unknown_{key}", custom_error_message=message)


def _is_same(value: Any, other: Any) -> bool:
    # In Python, true equals 1.
    return type(value) is type(other) and bool(value == other)


def _unknown(name: str, known: list[str]) -> RequestError:
    close = difflib.get_close_matches(name, known, 1)
    advice = f"did you mean {close[0]!r}?" if close else "leave it out"
    return RequestError(f"there is no field {name!r}; {advice}", name)
