"""The stored reference models, converted and compiled: each at most once in a test run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from paged_sequence import PagedSequence
from reference_cases import get_case

from mlc_llm.artifact import read_chat_config
from mlc_llm.runtime.runner import ModelRunner, Step

# What quantized linears multiply: exact float32 activations, or the default, rounded to int8.
FLOAT_OPT, INT8_OPT = "O2;activations=float32", "O2"
NUM_PAGES = 64
PAGE_SIZE = 16

Logits = NDArray[np.float32]


class TinyModels:
    """Artifacts, libraries and runners by case, quantization and compiler options.

    Files below `root` may be shared with other processes, which then wait for each other.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._runners: dict[tuple[Path, Path], Any] = {}

    def artifact(self, name: str, quantization: str = "q0f32") -> Path:
        """Return a directory of weights, tokenizer and chat config."""
        from mlc_llm.prepare.progress import NullProgress
        from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for

        output = self.root / name / quantization

        def make(directory: Path) -> None:
            source = get_case(name).directory
            write_chat_config_for(source, directory, quantization=quantization)
            convert_weights(source, directory, quantization=quantization, progress=NullProgress())

        return self._made(output, make)

    def compile(
        self, name: str, quantization: str = "q0f32", opt: str = FLOAT_OPT, **overrides: Any
    ) -> Any:
        """Compile anew and return the library in memory."""
        from mlc_llm.compiler.compile import CompileOptions, compile_model

        config = read_chat_config(self.artifact(name, quantization))
        return compile_model(config, CompileOptions("cpu", opt, overrides), lambda _: None)

    def library(
        self, name: str, quantization: str = "q0f32", opt: str = FLOAT_OPT, **overrides: Any
    ) -> Path:
        """Return a directory of object files."""
        options = json.dumps([opt, overrides], sort_keys=True).encode()
        output = self.root / name / f"{quantization}-{hashlib.sha256(options).hexdigest()[:16]}"

        def make(directory: Path) -> None:
            self.compile(name, quantization, opt, **overrides).save_objects(directory)

        return self._made(output, make)

    def _made(self, output: Path, make: Callable[[Path], None]) -> Path:
        """Return a directory, made in another place if it is missing and then moved to its own."""
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{output}.lock"):
            if not output.exists():
                unfinished = output.with_name(f"{output.name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(output)
        return output

    def gpu_runner(self, name: str, quantization: str, device: str) -> ModelRunner:
        """Return a runner with `NUM_PAGES` pages in the memory of a GPU, made anew."""
        from mlc_llm.compiler.compile import CompileOptions, compile_model
        from mlc_llm.runtime.library import load_library
        from mlc_llm.runtime.model import CompiledRunner
        from mlc_llm.runtime.parameters import load_parameters

        artifact = self.artifact(name, quantization)
        output = self.root / name / f"{quantization}-{device.replace(':', '-')}"

        def make(directory: Path) -> None:
            config = read_chat_config(artifact)
            compile_model(config, CompileOptions(device), lambda _: None).save_objects(directory)

        loaded = load_library(self._made(output, make), device)
        parameters = load_parameters(artifact, loaded, lambda _: None)
        return CompiledRunner(loaded, parameters, NUM_PAGES, NUM_PAGES)

    def runner(
        self, name: str, quantization: str = "q0f32", opt: str = FLOAT_OPT, **overrides: Any
    ) -> ModelRunner:
        """Return a runner with `NUM_PAGES` pages; it keeps what earlier tests wrote in them."""
        from mlc_llm.runtime.library import load_library
        from mlc_llm.runtime.model import CompiledRunner
        from mlc_llm.runtime.parameters import load_parameters

        artifact = self.artifact(name, quantization)
        library = self.library(name, quantization, opt, **overrides)
        key = artifact, library
        if key not in self._runners:
            loaded = load_library(library)
            parameters = load_parameters(artifact, loaded, lambda _: None)
            self._runners[key] = CompiledRunner(loaded, parameters, NUM_PAGES, NUM_PAGES)
        runner: ModelRunner = self._runners[key]
        return runner


def make_step(work: Sequence[tuple[PagedSequence, Sequence[int]]]) -> Step:
    """Return a step that brings each sequence new tokens and wants the logits of all of them.

    Where models have a recurrent state, a sequence's is in the slot with the number of its first
    page.
    """
    starts = [len(sequence.token_ids) for sequence, _ in work]
    slots = [sequence.grow(list(tokens)) for sequence, tokens in work]
    ends = [len(sequence.token_ids) for sequence, _ in work]
    table = np.zeros((len(work), max(len(sequence.pages) for sequence, _ in work)), np.int32)
    for row, (sequence, _) in enumerate(work):
        table[row, : len(sequence.pages)] = sequence.pages
    ranges = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    query_start = np.cumsum([0, *(len(positions) for positions in ranges)])
    return Step(
        token_ids=np.concatenate([tokens for _, tokens in work]).astype(np.int32),
        positions=np.concatenate(ranges).astype(np.int32),
        slots=np.concatenate(slots),
        query_start=query_start.astype(np.int32),
        page_table=table,
        context_len=np.asarray(ends, np.int32),
        logit_rows=np.arange(query_start[-1], dtype=np.int32),
        state_slots=np.asarray([sequence.pages[0] for sequence, _ in work], np.int32),
    )


def run_step(
    runner: ModelRunner, work: Sequence[tuple[PagedSequence, Sequence[int]]]
) -> list[Logits]:
    """Run one step that brings each sequence new tokens; return the logits of all of them."""
    step = make_step(work)
    return np.split(runner.forward(step).copy(), step.query_start[1:-1])


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
