"""`AsyncMLCEngine`: a model in this process, asked as `openai.AsyncOpenAI` is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlc_llm.api.opening import Report, open_models, print_to_stderr
from mlc_llm.api.owner import Owner
from mlc_llm.api.resources import (
    ChatCompletions,
    Completions,
    Embeddings,
    Models,
    Reranking,
    Responses,
    engine_ids,
)
from mlc_llm.engine.config import EngineConfig, Mode, apply_overrides
from mlc_llm.engine.metrics import EngineMetrics
from mlc_llm.errors import OptionError
from mlc_llm.serve.catalog import ServedModels


class Metrics:
    """What an engine has done so far: values by MLC LLM's keys, or Prometheus' text."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self.metrics = metrics.to_dict()
        self._text = metrics.prometheus_text()

    def __getitem__(self, key: str) -> Any:
        """Return one value."""
        return self.metrics[key]

    def prometheus_text(self) -> str:
        """Return everything in Prometheus' text format."""
        return self._text


class AsyncMLCEngine:
    """A model in this process, with the methods of `openai.AsyncOpenAI`.

        async with AsyncMLCEngine("HF://user/repo") as engine:
            answer = await engine.chat.completions.create(messages=[...])

    Answers are computed by a thread of their own and may be awaited on any event loop.
    `terminate`, leaving the block, or dropping the engine and its streams frees the model.
    """

    chat: SimpleNamespace  # chat.completions: ChatCompletions
    completions: Completions
    responses: Responses
    embeddings: Embeddings
    rerank: Reranking
    models: Models

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        *,
        model_lib: str | Path | None = None,
        mode: Mode = "local",
        engine_config: EngineConfig | None = None,
        enable_tracing: bool = False,
        quantization: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        embedding_model: str | Path | None = None,
        embedding_model_lib: str | Path | None = None,
        lora_adapter: str | Path | None = None,
        progress: Report | None = None,
    ) -> None:
        """Open a model, made ready first where needed, which may take minutes.

        model: an artifact or Hugging Face directory, a .gguf file or `HF://user/repo[@revision]`.
        model_lib: a library made by `mlc_llm compile`; compiled on the fly if left out. mode: see
        `EngineConfig`. overrides: what `mlc_llm serve` takes as --overrides. quantization: for
        models that are not converted yet. embedding_model: the one that `embeddings` asks; not
        needed where `model` is one for embeddings, which then has nothing else. lora_adapter: a
        directory that PEFT saved, merged into `model`, which must not be converted yet.
        progress: is told what is done; if left out it is printed to stderr, unless the
        configuration says verbose=False. Raises the errors of files, library and device.
        """
        if enable_tracing:
            raise OptionError("enable_tracing is not supported; metrics() tells where time goes")
        config = _config_of(mode, engine_config, overrides)
        report = progress or (print_to_stderr if config.verbose else lambda _: None)
        models, close = open_models(
            str(model),
            device,
            config,
            model_lib=_path_of(model_lib),
            quantization=quantization,
            embedding_model=None if embedding_model is None else str(embedding_model),
            embedding_model_lib=_path_of(embedding_model_lib),
            lora_adapter=_path_of(lora_adapter),
            report=report,
        )
        self._start(models, close)

    @classmethod
    def from_models(cls, models: ServedModels, close: Callable[[], None]) -> AsyncMLCEngine:
        """Return an engine of models whose worker runs; `close` ends them."""
        engine = cls.__new__(cls)
        engine._start(models, close)
        return engine

    def _start(self, models: ServedModels, close: Callable[[], None]) -> None:
        owner = self._owner = Owner(models, close)
        self.chat = SimpleNamespace(completions=ChatCompletions(owner))
        self.completions = Completions(owner)
        self.responses = Responses(owner)
        self.embeddings = Embeddings(owner)
        self.rerank = Reranking(owner)
        self.models = Models(owner)

    async def abort(self, request_id: str) -> None:
        """End a request within a step; ids that are not known are fine.

        request_id: as given to `create`, or the id of the answer. What was made of it is answered.
        """
        worker = self._owner.models.find_chat(None).worker
        for engine_id in engine_ids(request_id):
            worker.abort(engine_id)

    async def metrics(self) -> Metrics:
        """Return what the engine has done so far."""
        return Metrics(self._owner.models.find_chat(None).worker.metrics)

    async def reset(self) -> None:
        """Forget the cached prompts of all requests; those under way go on."""
        worker = self._owner.models.find_chat(None).worker
        await worker.run(lambda engine: engine.reset_prefix_cache())

    def terminate(self) -> None:
        """End what is under way with EngineStopped and free the models."""
        self._owner.close()

    async def __aenter__(self) -> AsyncMLCEngine:
        """Return the engine."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the engine; the event loop goes on meanwhile."""
        await asyncio.to_thread(self.terminate)


def _config_of(
    mode: Mode, config: EngineConfig | None, overrides: Mapping[str, Any] | None
) -> EngineConfig:
    config = config or EngineConfig()
    if config.mode is None:
        config = config.with_changes(mode=mode)
    elif mode not in ("local", config.mode):
        raise OptionError(f"mode is {mode!r}, that of engine_config {config.mode!r}; give one")
    return apply_overrides(config, overrides or {})


def _path_of(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
