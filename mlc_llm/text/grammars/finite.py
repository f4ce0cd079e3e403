"""Finds schemas of which no value is finite, such as an object that must hold one of its own kind.

An answer that comes to one never ends, even where it need not have come there.

A schema needs others: all those that it requires, and one of each list of alternatives. What needs
nothing has a finite value; so has what needs only such (Dowling and Gallier 1984, in linear time).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

_CHILDREN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_CHILDREN_MAPS = ("properties", "patternProperties")
_CHILDREN = ("items", "additionalProperties")


def find_endless(root: Any, follow: Callable[[str], Any]) -> str | None:
    """Return a $ref of a loop without end that a value of the root may come to; else None.

    follow: from a $ref to its schema. The root must have been checked.
    """
    if isinstance(root, bool):
        return None
    schemas = list(_reachable(root, follow))
    num_missing: dict[int, int] = {}
    # Who needs a schema, and through which list of alternatives, if any: one of those suffices.
    wanted_by: dict[int, list[tuple[int, int | None]]] = defaultdict(list)
    for schema in schemas:
        needs, alternatives = _needs(schema, follow)
        num_missing[id(schema)] = len(needs) + len(alternatives)
        for need in needs:
            wanted_by[id(need)].append((id(schema), None))
        for number, options in enumerate(alternatives):
            for option in options:
                wanted_by[id(option)].append((id(schema), number))
    finite = [key for key, count in num_missing.items() if count == 0]
    met: set[tuple[int, int]] = set()
    while finite:
        for key, group in wanted_by[finite.pop()]:
            if group is not None:
                if (key, group) in met:
                    continue
                met.add((key, group))
            num_missing[key] -= 1
            if num_missing[key] == 0:
                finite.append(key)
    endless = [schema for schema in schemas if num_missing[id(schema)]]
    if not endless:
        return None
    return next((str(schema["$ref"]) for schema in endless if "$ref" in schema), "#")


def _reachable(root: dict[str, Any], follow: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yield the schemas that parts of a value may be held to, each once; not unused definitions."""
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        waiting += [schema[name] for name in _CHILDREN if name in schema]
        for name in _CHILDREN_LISTS:
            waiting += schema.get(name, ())
        for name in _CHILDREN_MAPS:
            waiting += schema.get(name, {}).values()
        if "$ref" in schema:
            waiting.append(follow(schema["$ref"]))


def _needs(
    schema: dict[str, Any], follow: Callable[[str], Any]
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the schemas that every value holds a value of, and lists of which it holds one."""
    needs: list[Any] = list(schema.get("allOf", ()))
    if "$ref" in schema:
        needs.append(follow(schema["$ref"]))
    alternatives = [schema[name] for name in ("anyOf", "oneOf") if name in schema]
    parts: list[Any] = []
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    parts += [properties[name] for name in required if name in properties]
    has_more = schema.get("minProperties", 0) > len(properties) or not properties.keys() >= {
        *required
    }
    if has_more and not schema.get("patternProperties"):
        parts.append(schema.get("additionalProperties"))
    first = schema.get("prefixItems", [])
    num_items = schema.get("minItems", 0)
    parts += first[:num_items]
    if num_items > len(first) and "items" in schema:
        parts.append(schema["items"])
    if _may_be_scalar(schema):
        parts = []  # it need not be an object or a list at all
    return _dicts(needs + parts), [
        options for options in alternatives if all(isinstance(part, dict) for part in options)
    ]


def _may_be_scalar(schema: dict[str, Any]) -> bool:
    if "enum" in schema or "const" in schema:
        return True  # these values are finite
    kinds = schema.get("type", "string")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return any(kind not in ("object", "array") for kind in kinds)


def _dicts(schemas: list[Any]) -> list[dict[str, Any]]:
    return [schema for schema in schemas if isinstance(schema, dict)]
