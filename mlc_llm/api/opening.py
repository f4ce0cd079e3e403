"""From the names of models to models that are served: prepare, load, start the engine's thread."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import read_chat_config
from mlc_llm.device import environment
from mlc_llm.engine.config import EngineConfig, compile_overrides
from mlc_llm.engine.embedding import EmbeddingModel, is_embedding_model, open_embedding_model
from mlc_llm.engine.open import open_model
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.errors import ModelNotFound, OptionError
from mlc_llm.prepare.caches import Caches
from mlc_llm.prepare.jit import prepare_library
from mlc_llm.prepare.processes import RunFile
from mlc_llm.prepare.resolve import prepare_artifact
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.model import ServedModel

Report = Callable[[str], None]


class StageLines:
    """Tells each stage of long work as one line; implements `prepare.progress.Progress`."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Tell that a stage begins."""
        self._report(f"{stage} ...")

    def advance(self, n: int) -> None:
        """Count in silence."""

    def finish(self) -> None:
        """End in silence."""

    def message(self, text: str) -> None:
        """Tell a line."""
        self._report(text)


def print_to_stderr(text: str) -> None:
    """Print a line where it does not mix with a program's output."""
    print(text, file=sys.stderr, flush=True)


def open_models(
    model: str,
    device: str,
    config: EngineConfig,
    *,
    model_lib: Path | None,
    quantization: str | None,
    embedding_model: str | None,
    embedding_model_lib: Path | None,
    lora_adapter: Path | None,
    report: Report,
) -> tuple[ServedModels, Callable[[], None]]:
    """Return models that are served, and what ends them; what they lack is made first."""
    if embedding_model_lib is not None and embedding_model is None:
        raise OptionError("embedding_model_lib needs embedding_model; name the model too")
    for library in (model_lib, embedding_model_lib):
        if library is not None and not library.exists():
            raise ModelNotFound(f"{library} does not exist; make it with `mlc_llm compile`")
    maker = _Maker(device, config.opt, quantization, report)
    caches = Caches.from_environment(environment())
    with ExitStack() as cleanup:

        def open_vectors(name: str, artifact: Path, library: Path | None) -> EmbeddingModel:
            library = library or maker.find_library(artifact, {"model_task": "embedding"})
            cleanup.callback(RunFile(caches.home, "python", name, [artifact, library]).close)
            opened = open_embedding_model(
                artifact, library, name=name, device=device, progress=report
            )
            cleanup.callback(opened.close)
            return opened

        artifact = maker.find_artifact(model, lora_adapter)
        chat_config = read_chat_config(artifact)
        if is_embedding_model(chat_config):
            config.check_embeds(model)
            if embedding_model is not None:
                raise OptionError(
                    f"{model} is a model for embeddings itself; leave out embedding_model, or name "
                    "a model for chats first"
                )
            models = ServedModels(None, open_vectors(model, artifact, model_lib))
            return models, cleanup.pop_all().close
        embedding = None
        if embedding_model is not None:
            other = maker.find_artifact(embedding_model)
            embedding = open_vectors(embedding_model, other, embedding_model_lib)
        overrides = compile_overrides(config, chat_config)
        library = model_lib or maker.find_library(artifact, overrides)
        cleanup.callback(RunFile(caches.home, "python", model, [artifact, library]).close)
        opened = open_model(
            artifact, library, config, device=device, overrides=overrides, progress=report
        )
        cleanup.callback(opened.close)
        if config.verbose:
            report(str(opened.plan))
        worker = EngineWorker(
            opened.engine,
            max_queued_requests=config.max_queued_requests,
            request_timeout_s=config.request_timeout_s,
        )
        worker.start()
        cleanup.callback(worker.stop)
        models = ServedModels(ServedModel.of(name=model, opened=opened, worker=worker), embedding)
        return models, cleanup.pop_all().close


@dataclass(frozen=True)
class _Maker:
    """Finds what a model is made of, and makes what is missing."""

    device: str
    opt: str | None
    quantization: str | None
    report: Report

    def find_artifact(self, model: str, lora_adapter: Path | None = None) -> Path:
        caches = Caches.from_environment(environment())
        return prepare_artifact(
            model,
            quantization=self.quantization,
            home=caches.home,
            download_policy=caches.download_policy,
            jit_policy=caches.jit_policy,
            progress=StageLines(self.report),
            access=caches.hub,
            lora_adapter=lora_adapter,
        )

    def find_library(self, artifact: Path, overrides: Mapping[str, Any]) -> Path:
        caches = Caches.from_environment(environment())
        return prepare_library(
            artifact,
            device=self.device,
            opt=self.opt or "O2",
            overrides=overrides,
            home=caches.home,
            jit_policy=caches.jit_policy,
            progress=StageLines(self.report),
        )
