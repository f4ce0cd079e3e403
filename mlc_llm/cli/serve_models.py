"""The models of `mlc_llm serve`: one for chats, one for embeddings, or both.

Knows in which order they are found, made and loaded. Does not know the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.cli.open_model import find_artifact, find_library, note_process
from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import show_progress
from mlc_llm.engine.config import EngineConfig, compile_overrides
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.engine.embedding import EmbeddingModel
    from mlc_llm.engine.open import OpenModel
    from mlc_llm.prepare.processes import RunFile

_FOR_EMBEDDINGS = {"model_task": "embedding"}


@dataclass(frozen=True)
class Choice:
    """The models to serve and how they are made."""

    model: str | None
    library: Path | None
    embedding_model: str | None
    embedding_library: Path | None
    quantization: str | None
    lora_adapter: Path | None
    opt: str


def open_models(
    chosen: Choice, device: str, config: EngineConfig, name: str, cleanup: ExitStack
) -> tuple[OpenModel | None, EmbeddingModel | None, RunFile]:
    """Make what the models lack and load them; `cleanup` closes them and their run file.

    name: what requests call the first model, which may be one for embeddings.
    """
    from mlc_llm.artifact import read_chat_config
    from mlc_llm.engine.embedding import is_embedding_model, open_embedding_model

    caches = read_caches()
    with show_progress() as progress:

        def find(artifact: Path, library: Path | None, overrides: Mapping[str, Any]) -> Path:
            return library or find_library(
                artifact,
                device=device,
                opt=chosen.opt,
                overrides=overrides,
                caches=caches,
                progress=progress,
            )

        def open_vectors(name: str, artifact: Path, library: Path) -> EmbeddingModel:
            opened = open_embedding_model(
                artifact, library, name=name, device=device, progress=progress.message
            )
            cleanup.callback(opened.close)
            return opened

        artifact = find_artifact(
            chosen.model, chosen.quantization, caches, progress, chosen.lora_adapter
        )
        chat_config = read_chat_config(artifact)
        if is_embedding_model(chat_config):
            config.check_embeds(name)
            if chosen.embedding_model is not None:
                raise OptionError(
                    f"{chosen.model} is a model for embeddings itself; leave out "
                    "--embedding-model, or name a model for chats first"
                )
            library = find(artifact, chosen.library, _FOR_EMBEDDINGS)
            running = note_process("serve", chosen.model, caches, [artifact, library])
            cleanup.callback(running.close)
            return None, open_vectors(name, artifact, library), running
        embedding, used = None, []
        if chosen.embedding_model is not None:
            other = find_artifact(chosen.embedding_model, chosen.quantization, caches, progress)
            library = find(other, chosen.embedding_library, _FOR_EMBEDDINGS)
            used = [other, library]
            embedding = open_vectors(chosen.embedding_model, other, library)
        overrides = compile_overrides(config, chat_config)
        library = find(artifact, chosen.library, overrides)
        running = note_process("serve", chosen.model, caches, [*used, artifact, library])
        cleanup.callback(running.close)
        from mlc_llm.engine.open import open_model

        opened = open_model(
            artifact,
            library,
            config,
            device=device,
            overrides=overrides,
            progress=progress.message,
        )
    cleanup.callback(opened.close)
    return opened, embedding, running
