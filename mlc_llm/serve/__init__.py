"""Serving one model to many users; the names that programs import from here are loaded lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlc_llm.engine.config import EngineConfig
    from mlc_llm.serve.popen_server import PopenServer

__all__ = ["EngineConfig", "PopenServer"]

_HOMES = {
    "EngineConfig": "mlc_llm.engine.config",
    "PopenServer": "mlc_llm.serve.popen_server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
