"""The place from which older programs import the engine's configuration."""

from mlc_llm.engine.config import EngineConfig

__all__ = ["EngineConfig"]
