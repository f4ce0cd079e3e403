"""Calls of Emscripten, the compiler and linker for WebAssembly. Knows nothing of models."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlc_llm.errors import CompileError, LinkerNotFound

_ERROR_CHARS = 600


def require_emscripten(path: Path) -> str:
    """Return the program. Raises LinkerNotFound, which names the library `path`."""
    program = shutil.which("emcc")
    if program is None:
        raise LinkerNotFound(
            f"{path} is linked with Emscripten, and there is no emcc; install it (Debian: apt "
            "install emscripten; macOS: brew install emscripten; or https://emscripten.org), or "
            "write a .tar of object files"
        )
    return program


def version_of(program: str) -> str:
    """Return the first line of what the program says of its version."""
    return _run([program, "--version"], "asking for the version of").splitlines()[0]


def run_emscripten(program: str, arguments: Sequence[str], what: str) -> None:
    """Run it. Raises CompileError, which says `what` failed."""
    _run([program, *arguments], what)


def _run(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{what} {command[0]} failed: {error}") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        raise CompileError(
            f"{what} {command[0]} failed: {' '.join(errors or [said])[:_ERROR_CHARS]}"
        )
    return done.stdout
