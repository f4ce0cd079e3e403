"""Universal LLM engine: compile any open model for any device and serve it.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlc_llm.api import AsyncMLCEngine, MLCEngine
    from mlc_llm.chat_module import ChatModule

__version__ = "0.1.0"
__all__ = ["AsyncMLCEngine", "ChatModule", "MLCEngine", "__version__"]

_HOMES = {
    "AsyncMLCEngine": "mlc_llm.api",
    "MLCEngine": "mlc_llm.api",
    "ChatModule": "mlc_llm.chat_module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
