"""`MLCEngine`: `AsyncMLCEngine` for programs without an event loop.

It runs on a loop in a thread of its own, so it works in notebooks too, whatever loop runs there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

from mlc_llm.api.bridge import Bridge, Stream
from mlc_llm.api.engine import AsyncMLCEngine, Metrics
from mlc_llm.api.resources import AsyncStream
from mlc_llm.serve.catalog import ServedModels


class MLCEngine:
    """A model in this process, with the methods of `openai.OpenAI`.

        with MLCEngine("HF://user/repo") as engine:
            answer = engine.chat.completions.create(messages=[...])

    Any thread may call it, several at once too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Open a model; arguments are those of `AsyncMLCEngine`."""
        self._start(AsyncMLCEngine(*args, **options))

    @classmethod
    def from_models(cls, models: ServedModels, close: Callable[[], None]) -> MLCEngine:
        """Return an engine of models whose worker runs; `close` ends them."""
        engine = cls.__new__(cls)
        engine._start(AsyncMLCEngine.from_models(models, close))
        return engine

    def _start(self, engine: AsyncMLCEngine) -> None:
        self._engine, self._bridge = engine, Bridge()
        completions = engine.chat.completions
        self.chat = SimpleNamespace(
            completions=SimpleNamespace(create=self._waiting(completions.create))
        )
        self.completions = SimpleNamespace(create=self._waiting(engine.completions.create))
        self.responses = SimpleNamespace(create=self._waiting(engine.responses.create))
        self.embeddings = SimpleNamespace(create=self._waiting(engine.embeddings.create))
        self.rerank = SimpleNamespace(create=self._waiting(engine.rerank.create))
        self.models = SimpleNamespace(
            list=self._waiting(engine.models.list), retrieve=self._waiting(engine.models.retrieve)
        )

    def _waiting(self, method: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        bridge = self._bridge  # and not self, so that there is no cycle

        @functools.wraps(method)
        def call(*args: Any, **fields: Any) -> Any:
            answer = bridge.run(method(*args, **fields))
            return Stream(bridge, answer) if isinstance(answer, AsyncStream) else answer

        return call

    def abort(self, request_id: str) -> None:
        """End a request within a step; ids that are not known are fine."""
        self._bridge.run(self._engine.abort(request_id))

    def metrics(self) -> Metrics:
        """Return what the engine has done so far."""
        return self._bridge.run(self._engine.metrics())

    def reset(self) -> None:
        """Forget the cached prompts of all requests; those under way go on."""
        self._bridge.run(self._engine.reset())

    def terminate(self) -> None:
        """End what is under way with EngineStopped and free the models."""
        self._engine.terminate()
        self._bridge.close()

    def __enter__(self) -> MLCEngine:
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the engine."""
        self.terminate()
