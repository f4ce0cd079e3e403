"""The engine as Python objects: from a model's name to answers in the types of OpenAI's package."""

from mlc_llm.api.bridge import Stream
from mlc_llm.api.engine import AsyncMLCEngine, Metrics
from mlc_llm.api.resources import AsyncStream
from mlc_llm.api.sync import MLCEngine

__all__ = ["AsyncMLCEngine", "AsyncStream", "MLCEngine", "Metrics", "Stream"]
