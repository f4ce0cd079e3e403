"""The model under measurement: prepared like any other or made of random weights, then loaded."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.cli.open_model import find_artifact, find_library
from mlc_llm.cli.options import read_caches
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.bench.workloads import Workload
    from mlc_llm.device import Device
    from mlc_llm.prepare.caches import Caches
    from mlc_llm.prepare.progress import Progress
    from mlc_llm.runtime.runner import ModelRunner


@dataclass(frozen=True)
class Subject:
    """What the user wants measured: a model, or the configuration of one (random_weights)."""

    model: str | None
    random_weights: Path | None
    quantization: str | None
    device: str
    opt: str
    overrides: Mapping[str, Any]
    library: Path | None
    seed: int

    def __post_init__(self) -> None:
        if self.random_weights is None:
            return
        if self.model is not None:
            raise OptionError("MODEL and --random-weights both name a model; use one of them")
        if self.library is not None:
            raise OptionError(
                "--random-weights compiles its own library, --model-lib has no use; leave it out"
            )

    @property
    def label(self) -> str:
        """Name of the model in reports."""
        if self.random_weights is not None:
            return f"{self.random_weights} (random weights)"
        return "demo model" if self.model is None else self.model


@dataclass(frozen=True)
class LoadedModel:
    """A runner, and what it took to get there; compile_s is None where nothing was compiled."""

    runner: ModelRunner
    device: Device
    quantization: str
    threads: int
    weight_bytes: int
    load_s: float
    compile_s: float | None


def load_subject(
    subject: Subject, workloads: Sequence[Workload], progress: Progress
) -> LoadedModel:
    """Prepare and load a model with KV pages for the workloads, all of them in memory.

    Raises what `prepare`, the compiler and the runtime raise, and OptionError where the library
    does not allow a workload.
    """
    from mlc_llm.artifact import read_chat_config
    from mlc_llm.bench.random_weights import random_parameters, weight_bytes_of
    from mlc_llm.bench.workloads import check_workloads, num_pages_of, num_state_slots_of
    from mlc_llm.engine.open import check_library
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.runtime.library import load_library, num_threads
    from mlc_llm.runtime.model import CompiledRunner
    from mlc_llm.runtime.parameters import load_parameters

    caches = read_caches()
    with tempfile.TemporaryDirectory(prefix="mlc_llm-") as work:
        if subject.random_weights is None:
            artifact = find_artifact(subject.model, subject.quantization, caches, progress)
        else:
            artifact = _write_config(subject.random_weights, subject.quantization, Path(work))
        config = read_chat_config(artifact)
        library, compile_s = _library_of(subject, artifact, caches, progress)
        start = time.perf_counter()
        loaded = load_library(library, subject.device, progress.message)
        metadata = loaded.metadata
        check_library(metadata, config, subject.overrides, str(library))
        check_workloads(workloads, metadata, _memory_bytes())
        if subject.random_weights is None:
            parameters = load_parameters(artifact, loaded, progress.message)
        else:
            bits = get_scheme(config.quantization).bits
            parameters = random_parameters(loaded, bits, subject.seed)
    num_pages = num_pages_of(workloads, metadata.kv_cache.page_size)
    runner = CompiledRunner(loaded, parameters, num_pages, num_state_slots_of(workloads))
    load_s = time.perf_counter() - start
    runner.touch_pages()
    weight_bytes = weight_bytes_of(metadata, parameters)
    found = (config.quantization, num_threads(), weight_bytes, load_s, compile_s)
    return LoadedModel(runner, loaded.device, *found)


def _write_config(path: Path, quantization: str | None, work: Path) -> Path:
    """Write the chat configuration for a `config.json` (or its directory) to an empty directory."""
    from mlc_llm.artifact import read_json_object, write_atomically, write_chat_config
    from mlc_llm.prepare.original import read_compile_config
    from mlc_llm.prepare.resolve import DEFAULT_QUANTIZATION

    content = read_json_object(path / "config.json" if path.is_dir() else path)
    write_atomically(work / "config.json", json.dumps(content))
    quantization = quantization or DEFAULT_QUANTIZATION
    write_chat_config(work, read_compile_config(work, quantization=quantization))
    return work


def _library_of(
    subject: Subject, artifact: Path, caches: Caches, progress: Progress
) -> tuple[Path, float | None]:
    """Return the library, and the seconds of its compilation if there was one."""
    if subject.library is not None:
        return subject.library, None
    witness = _CompilationWitness(progress)
    start = time.perf_counter()
    library = find_library(
        artifact,
        device=subject.device,
        opt=subject.opt,
        overrides=subject.overrides,
        caches=caches,
        progress=witness,
    )
    return library, time.perf_counter() - start if witness.has_seen_work else None


class _CompilationWitness:
    """Passes progress on and notes whether there was any: a cached library needs no stage."""

    def __init__(self, progress: Progress) -> None:
        self.has_seen_work = False
        self._progress = progress

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage."""
        self.has_seen_work = True
        self._progress.start(stage, total, unit)

    def advance(self, n: int) -> None:
        """Count units."""
        self._progress.advance(n)

    def finish(self) -> None:
        """End the stage."""
        self._progress.finish()

    def message(self, text: str) -> None:
        """Tell a line."""
        self._progress.message(text)


def _memory_bytes() -> int | None:
    """Return the memory of this machine, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call, or no such name
        return None
