"""Configurations come from files that may be damaged: values of wrong types become CorruptFile."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from mlc_llm.errors import CorruptFile


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


# Declared types of fields, as `from __future__ import annotations` keeps them.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": _is_count,
    "float": _is_real,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "dict[str, Any]": lambda value: isinstance(value, dict),
}


def check_fields(config: Any) -> None:
    """Raise CorruptFile unless the fields of a dataclass have the types they are declared with."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind, _, alternative = str(field.type).partition(" | ")
        if kind not in _CHECKS or (alternative == "None" and value is None):
            continue
        if not _CHECKS[kind](value):
            raise CorruptFile(
                f"model configuration: {field.name} must be of type {kind}, is {value!r:.60}"
            )


def check_layer_types(kinds: Any, num_layers: int, known: tuple[str, ...]) -> None:
    """Raise CorruptFile unless `layer_types` is None or names a known kind for each layer."""
    if kinds is None:
        return
    is_list = isinstance(kinds, list | tuple) and len(kinds) == num_layers
    if not is_list or not all(kind in known for kind in kinds):
        raise CorruptFile(
            f"model configuration: layer_types must name {' or '.join(known)} for each of "
            f"{num_layers} layers, it is {kinds!r:.200}"
        )


@contextlib.contextmanager
def configuration_errors() -> Iterator[None]:
    """Turn what strange values in a configuration may raise into CorruptFile."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CorruptFile(
            f"the configuration of the model holds a strange value ({error!s:.200}); "
            "fetch or make it again"
        ) from error
