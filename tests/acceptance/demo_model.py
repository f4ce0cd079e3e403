"""The demo model where the program looks for it, and as an engine in this process."""

from __future__ import annotations

from pathlib import Path

from program import Program

from mlc_llm.artifact import read_chat_config
from mlc_llm.engine.config import EngineConfig, compile_overrides
from mlc_llm.engine.open import OpenModel, open_model
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.jit import prepare_library
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import prepare_artifact


def place_demo_model(program: Program, demo_gguf: Path) -> None:
    """Put the file where `make demo` puts it."""
    place = program.home / "model_weights" / "demo" / demo_gguf.name
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.symlink_to(demo_gguf)


def open_demo_model(program: Program, demo_gguf: Path, config: EngineConfig) -> OpenModel:
    """Convert and compile the model in the program's cache if need be, and load it."""
    place_demo_model(program, demo_gguf)
    home, progress = CacheHome(program.home), NullProgress()
    artifact = prepare_artifact(
        None,
        quantization=None,
        home=home,
        download_policy=CachePolicy.READONLY,
        jit_policy=CachePolicy.ON,
        progress=progress,
    )
    overrides = compile_overrides(config, read_chat_config(artifact))
    library = prepare_library(
        artifact,
        device="auto",
        opt="O2",
        overrides=overrides,
        home=home,
        jit_policy=CachePolicy.ON,
        progress=progress,
    )
    return open_model(artifact, library, config, overrides=overrides)
