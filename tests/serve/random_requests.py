"""Random values for the fields of requests, the nasty ones often."""

from __future__ import annotations

import random
from typing import Any

from pydantic import BaseModel

SPICE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, -0.0, 2**31, 2**63, -(2**64), 10**400, "", "a", "1",
    "\ud800", "\x00", "a" * 3000, float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None],
    [1, "a"], [{}], {"": 1}, {"1": 1}, {"type": "text"}, {"a": {"b": [1]}}, "auto", "none",
]  # fmt: skip


def random_value(draw: random.Random, depth: int = 0) -> Any:
    """Return a JSON value, and now and then one that JSON does not have."""
    kind = draw.randrange(8)
    if kind == 0 and depth < 4:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 1 and depth < 4:
        keys = [draw.choice(["role", "content", "type", "text", "1", "x"]) for _ in range(3)]
        return {key: random_value(draw, depth + 1) for key in keys}
    if kind == 2:
        return draw.uniform(-3, 3)
    if kind == 3:
        return draw.randrange(-3, 9)
    return draw.choice(SPICE)


def random_fields(draw: random.Random, kind: type[BaseModel]) -> dict[str, Any]:
    """Return one to three fields of a request with random values."""
    names = draw.sample(sorted(kind.model_fields), draw.randrange(1, 4))
    return {name: random_value(draw) for name in names}
