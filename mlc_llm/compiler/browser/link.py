"""Linking of a model's objects and TVM's runtime to one WebAssembly file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlc_llm.compiler.browser.emscripten import require_emscripten, run_emscripten
from mlc_llm.compiler.browser.runtime import runtime_objects

# The host's code is small and runs little: time is spent in WebGPU, so a fast link is worth more.
_FLAGS = (
    *("-O1", "--no-entry"),
    *("-s", "WASM_BIGINT=1", "-s", "STANDALONE_WASM=1", "-s", "ERROR_ON_UNDEFINED_SYMBOLS=0"),
    *("-s", "ALLOW_MEMORY_GROWTH=1", "-s", "TOTAL_MEMORY=160MB"),
)


def link_wasm(
    objects: Sequence[Path], path: Path, cache: Path, progress: Callable[[str], None]
) -> None:
    """Write `path` whole or not at all; `cache` keeps the runtime.

    Raises LinkerNotFound or CompileError.
    """
    program = require_emscripten(path)
    runtime = runtime_objects(program, cache, progress)
    progress("linking for the browser")
    # Emscripten goes by the suffix.
    temporary = path.with_name(f".{path.stem}.tmp.wasm")
    try:
        inputs = [str(file) for file in (*runtime, *objects)]
        run_emscripten(program, [*_FLAGS, *inputs, "-o", str(temporary)], f"linking {path} with")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
