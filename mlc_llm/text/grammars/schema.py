"""Which JSON Schemas are understood: every keyword is enforced, known to say nothing, or refused.

Checks names, types and sizes. What the values mean is llguidance's business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.finite import find_endless

PARAM = "response_format"
MAX_SOURCE_CHARS = 1 << 18
MAX_VALUES = 20_000
MAX_DEPTH = 64
MAX_ENUM_VALUES = 5_000
MAX_PROPERTIES = 1_000
_MAX_COUNT = 1 << 20
_MAX_SHOWN = 80

_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri"),
    "uuid",
)
# Keywords that say nothing of which values are valid.
ANNOTATIONS = frozenset(
    [
        *("$comment", "title", "description", "default", "examples", "deprecated", "readOnly"),
        *("writeOnly", "discriminator"),
    ]
)
_DIALECTS = ("draft/2020-12/schema", "draft/2019-09/schema", "draft-07/schema", "draft-06/schema")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties")

Place = tuple[str | int, ...]


def check_schema(schema: Any) -> dict[str, Any] | bool:
    """Return a JSON Schema (parsed JSON, which may be changed) as llguidance is to read it.

    Raises RequestError that names what is not supported and where it is.
    """
    check_size(schema)
    if schema is False:
        raise RequestError("the schema is false: it allows no value", PARAM)
    walk = _Walk(schema)
    walk.check_all()
    for pointer, place in walk.references:
        _resolve(schema, pointer, place, walk.is_schema)
    endless = find_endless(schema, lambda pointer: _follow(schema, pointer))
    if endless is not None:
        raise _refusal((), f"the loop of $ref {_show(endless)} never ends: no value is finite")
    checked: dict[str, Any] | bool = schema
    return checked


def check_size(value: Any) -> None:
    """Raise RequestError for a value with more parts, or deeper ones, than a schema may have.

    Does not look further than that, so it is quick whatever comes.
    """
    num_values, level, depth = 0, [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the schema is more than {MAX_DEPTH} levels deep", PARAM)
        below: list[Any] = []
        for part in level:
            children = _children(part)
            num_values += len(children)
            if num_values > MAX_VALUES:
                raise RequestError(f"the schema has more than {MAX_VALUES:,} values", PARAM)
            below += children
        level = below


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        # Values that are not looked into need no list of them.
        return list(value.values()) if len(value) <= MAX_VALUES else [None] * len(value)
    if isinstance(value, list):
        return value
    return []


def parse_schema(source: str) -> Any:
    """Return the value that JSON text stands for. Raises RequestError."""
    if len(source) > MAX_SOURCE_CHARS:
        raise RequestError(
            f"the schema has {len(source):,} characters, at most {MAX_SOURCE_CHARS:,} may be", PARAM
        )
    try:
        return json.loads(source, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError(f"the schema is more than {MAX_DEPTH} levels deep", PARAM) from None
    except ValueError as error:
        raise RequestError(f"the schema is not JSON: {error}", PARAM) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class _Walk:
    """One visit of all schemas in a schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._ids: set[int] = set()
        self._num_enum_values = 0
        self._num_properties = 0
        self.references: list[tuple[str, Place]] = []

    def is_schema(self, value: Any) -> bool:
        """Return whether a value of the root is a schema that was visited."""
        return isinstance(value, bool) or id(value) in self._ids

    def check_all(self) -> None:
        """Check every schema, outermost first."""
        waiting: list[tuple[Any, Place]] = [(self._root, ())]
        while waiting:
            schema, place = waiting.pop()
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, dict):
                raise _refusal(place, f"must be a schema, is {_show(schema)}")
            self._ids.add(id(schema))
            for name in list(schema):
                waiting += self._check(schema, name, place)

    def _check(
        self, schema: dict[str, Any], name: str, place: Place
    ) -> Iterator[tuple[Any, Place]]:
        """Check one keyword; yield the schemas in it."""
        value = schema[name]
        here = (*place, name)
        if name in _SCHEMAS:
            if isinstance(value, list):
                raise _refusal(here, "is a list, as older drafts had it; use prefixItems")
            yield value, here
        elif name in _LISTS_OF_SCHEMAS:
            if not isinstance(value, list) or not value:
                raise _refusal(here, f"must be a list of schemas, is {_show(value)}")
            yield from ((part, (*here, index)) for index, part in enumerate(value))
        elif name in _MAPS_OF_SCHEMAS:
            if not isinstance(value, dict):
                raise _refusal(here, f"must map names to schemas, is {_show(value)}")
            if name in ("properties", "patternProperties"):
                self._num_properties += len(value)
                if self._num_properties > MAX_PROPERTIES:
                    raise _refusal(here, f"makes more than {MAX_PROPERTIES:,} properties in all")
            yield from ((part, (*here, key)) for key, part in value.items())
        elif name in _CHECKS:
            _CHECKS[name](value, here)
        elif name in ("enum", "const"):
            self._count_enum(value if name == "enum" else [value], here)
        elif name == "$ref":
            if not isinstance(value, str) or not value.startswith("#"):
                raise _refusal(here, f"must point into the schema ('#/...'), is {_show(value)}")
            self.references.append((value, here))
        elif name == "format":
            _check_format(value, schema, here)
        elif name in ("$schema", "$id") and not place:
            _check_dialect(value, here) if name == "$schema" else None
            del schema[name]
        elif name == "uniqueItems" and value is False:
            del schema[name]
        elif name not in ANNOTATIONS:
            raise _refusal(here, "is a keyword that is not supported")

    def _count_enum(self, values: Any, here: Place) -> None:
        if not isinstance(values, list) or not values:
            raise _refusal(here, f"must be a list of values, is {_show(values)}")
        self._num_enum_values += len(values)
        if self._num_enum_values > MAX_ENUM_VALUES:
            raise _refusal(here, f"makes more than {MAX_ENUM_VALUES:,} enum values in all")


def _check_type(value: Any, here: Place) -> None:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise _refusal(here, f"must be of {', '.join(_TYPES)}, is {_show(value)}")


def _check_required(value: Any, here: Place) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _refusal(here, f"must be a list of names, is {_show(value)}")


def _check_number(value: Any, here: Place) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise _refusal(here, f"must be a number, is {_show(value)}")


def _check_multiple(value: Any, here: Place) -> None:
    _check_number(value, here)
    if value <= 0:
        raise _refusal(here, f"must be a number above 0, is {_show(value)}")


def _check_count(value: Any, here: Place) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
        raise _refusal(here, f"must be a whole number from 0 to {_MAX_COUNT:,}, is {_show(value)}")


def _check_text(value: Any, here: Place) -> None:
    if not isinstance(value, str):
        raise _refusal(here, f"must be a text, is {_show(value)}")


def _check_format(value: Any, schema: dict[str, Any], here: Place) -> None:
    if value not in FORMATS:
        raise _refusal(here, f"{_show(value)} is not supported; known are {', '.join(FORMATS)}")
    kinds = schema.get("type", "string")
    if kinds != "string" and not (isinstance(kinds, list) and "string" in kinds):
        raise _refusal(here, f"says nothing of values of type {_show(kinds)}; leave it out")


def _check_dialect(value: Any, here: Place) -> None:
    _check_text(value, here)
    if not value.rstrip("#").endswith(_DIALECTS):
        raise _refusal(here, f"{_show(value)} is not known; use draft 2020-12")


_CHECKS: dict[str, Callable[[Any, Place], None]] = {
    "type": _check_type,
    "required": _check_required,
    "pattern": _check_text,
    "multipleOf": _check_multiple,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _check_number),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        _check_count,
    ),
}


def _resolve(root: Any, pointer: str, place: Place, is_schema: Callable[[Any], bool]) -> None:
    target = _follow(root, pointer)
    if target is None or not is_schema(target):
        raise _refusal(place, f"{_show(pointer)} points to no schema")


def _follow(root: Any, pointer: str) -> Any:
    """Return what a JSON pointer (RFC 6901) of a $ref points to, None if there is nothing."""
    here = root
    if pointer == "#":
        return here
    if not pointer.startswith("#/"):
        return None
    for step in unquote(pointer[2:]).split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(here, dict) and name in here:
            here = here[name]
        elif isinstance(here, list) and name.isdigit() and len(name) < 7 and int(name) < len(here):
            here = here[int(name)]
        else:
            return None
    return here


def _refusal(place: Place, reason: str) -> RequestError:
    where = "schema"
    for step in place:
        where += f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_SHOWN]}"
    if len(where) > 4 * _MAX_SHOWN:
        where = f"{where[: 2 * _MAX_SHOWN]} ... {where[-2 * _MAX_SHOWN :]}"
    return RequestError(f"{where} {reason}", PARAM)


def _show(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "...")
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:_MAX_SHOWN]
