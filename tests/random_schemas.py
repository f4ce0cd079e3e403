"""Random JSON Schemas of all keywords that are supported, each with values that fit it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("name", "age", "city", "kind", "a b", "größe", "x/y", "tags", "unit", "é~1")
_PATTERNS = (
    "^[a-z]{1,6}$",
    "^(red|green|blue) [0-9]{1,3}$",
    "[0-9]{2,4}",
    "^A.{0,5}Z$",
    r"^\d+(\.\d{1,2})?$",
    "^[^ab]{2,5}$",
    r"^[A-Z]\w{0,4}(-\w{1,3})?$",
)
_FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")
_FORMATS += ("uri",)
_NOTES = {
    "title": "T",
    "description": "what it is",
    "examples": [1],
    "deprecated": False,
    "default": None,
    "$comment": "as agreed",
    "readOnly": True,
    "writeOnly": False,
}


class SchemaMaker:
    """Makes schemas from a seed; `$defs` are made along the way, and may refer to themselves.

    Some of them go by their older name, `definitions`.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._defs: dict[str, Schema] = {}
        self._place = "definitions" if self._random.random() < 0.2 else "$defs"
        self._num_refs = 0

    def make(self) -> Schema:
        """Return a schema, mostly of an object."""
        top = self._object(3) if self._random.random() < 0.7 else self._any(3)
        if self._defs:
            top = {**top, self._place: self._defs}
        if self._random.random() < 0.1:
            top["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        return top

    def _any(self, depth: int) -> Schema:
        kinds: list[Callable[[int], Schema]] = [self._string, self._string, self._number]
        kinds += [self._integer, self._choice, self._flat]
        if depth > 0:
            kinds += [self._object, self._array, self._alternatives, self._both, self._reference]
        schema = self._random.choice(kinds)(depth)
        if self._random.random() < 0.1:
            key = self._random.choice(list(_NOTES))
            schema = {**schema, key: _NOTES[key]}
        return schema

    def _flat(self, depth: int) -> Schema:
        return self._random.choice(
            [
                {"type": "boolean"},
                {"type": "null"},
                {"type": ["integer", "null"]},
                {"type": ["string", "boolean"], "maxLength": 5},
                {"const": self._random.choice(["fixed", 7, None, [1, "a"], {"k": True}])},
            ]
        )

    def _choice(self, depth: int) -> Schema:
        values = ["red", "dark red", "größer", 1, 2.5, True, None, [1, 2], {"a": 1}, 'q"uote\\']
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _string(self, depth: int) -> Schema:
        roll = self._random.random()
        if roll < 0.3:
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        if roll < 0.55:
            return {"type": "string", "format": self._random.choice(_FORMATS)}
        low = self._random.choice([0, 0, 1, 3])
        schema: Schema = {"type": "string", "maxLength": low + self._random.randint(0, 8)}
        if low:
            schema["minLength"] = low
        return schema

    def _integer(self, depth: int) -> Schema:
        schema = self._bounds(lambda: self._random.randint(-1000, 1000), 1)
        if self._random.random() < 0.3:
            schema["multipleOf"] = self._random.choice([2, 5, 10])
            low = schema.pop("minimum", schema.pop("exclusiveMinimum", 0))
            high = schema.pop("maximum", schema.pop("exclusiveMaximum", low))
            schema |= {"minimum": low, "maximum": max(high, low + 40)}
        return {"type": "integer", **schema}

    def _number(self, depth: int) -> Schema:
        return {"type": "number", **self._bounds(lambda: self._random.randint(-500, 500) / 4, 0.5)}

    def _bounds(self, draw: Callable[[], float], gap: float) -> Schema:
        low, high = sorted([draw(), draw()])
        high += 2 * gap
        schema: Schema = {}
        if self._random.random() < 0.6:
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._random.random() < 0.8:
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = high
        return schema

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(_WORDS, self._random.randint(0, 4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
        }
        required = [name for name in names if self._random.random() < 0.7]
        if required:
            schema["required"] = required
        roll = self._random.random()
        if roll < 0.6:
            schema["additionalProperties"] = False
        elif roll < 0.75:
            schema["additionalProperties"] = self._random.choice([self._integer(0), True])
        elif roll < 0.85:
            schema["patternProperties"] = {"^z[0-9]$": self._flat(0)}
            schema["additionalProperties"] = False
        if roll < 0.1 and set(names) == set(required):
            schema["minProperties"] = len(names)
            schema["maxProperties"] = len(names)
        return schema

    def _array(self, depth: int) -> Schema:
        low = self._random.choice([0, 0, 1, 2])
        schema: Schema = {"type": "array", "maxItems": low + self._random.randint(0, 3)}
        if low:
            schema["minItems"] = low
        if self._random.random() < 0.3:
            count = self._random.randint(1, 3)
            schema["prefixItems"] = [self._any(depth - 1) for _ in range(count)]
            schema["items"] = self._random.choice([False, self._flat(0)])
            if schema["items"] is False:
                schema["minItems"] = min(low, count)
                schema["maxItems"] = count
        else:
            schema["items"] = self._any(depth - 1)
        return schema

    def _alternatives(self, depth: int) -> Schema:
        roll = self._random.random()
        if roll < 0.1:
            return self._tagged(depth)
        if roll < 0.4:
            kinds = self._random.sample([self._string, self._integer, self._object, self._array], 2)
            return {"oneOf": [kind(depth - 1) for kind in kinds]}
        options = [self._any(depth - 1) for _ in range(self._random.randint(2, 3))]
        return {"anyOf": options}

    def _tagged(self, depth: int) -> Schema:
        """Return objects of several kinds that a property tells apart."""
        options = [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "it": self._any(depth - 1)},
                "required": ["kind"],
                "additionalProperties": False,
            }
            for kind in self._random.sample(("a", "b", "c"), 2)
        ]
        return {"oneOf": options, "discriminator": {"propertyName": "kind"}}

    def _both(self, depth: int) -> Schema:
        first, second = self._random.sample(_WORDS, 2)
        return {
            "allOf": [
                {"type": "object", "properties": {first: self._any(0)}, "required": [first]},
                {"properties": {second: self._any(0)}, "required": [second]},
            ]
        }

    def _reference(self, depth: int) -> Schema:
        self._num_refs += 1
        name = f"d{self._num_refs}"
        roll = self._random.random()
        if roll < 0.1:
            return self._list_of("#")
        if roll < 0.4:
            self._defs[name] = self._list_of(self._pointer(name))
        else:
            self._defs[name] = self._any(depth - 1)
        return {"$ref": self._pointer(name)}

    def _pointer(self, name: str) -> str:
        return f"#/{self._place}/{name}"

    def _list_of(self, pointer: str) -> Schema:
        """Return objects of which each may lead to what a $ref points to."""
        return {
            "type": "object",
            "properties": {
                "value": self._integer(0),
                "next": {"anyOf": [{"$ref": pointer}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }


def random_schemas(count: int, seed: int = 0) -> list[Schema]:
    """Return schemas; the same for the same arguments."""
    return [SchemaMaker(seed * 1_000_003 + number).make() for number in range(count)]
