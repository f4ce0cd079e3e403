"""Which program links code for a system: this machine's, a cross linker, or `ziglang` from PyPI."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from mlc_llm.compiler.target import host_triple
from mlc_llm.errors import LinkerNotFound

_LINKERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")
_LINUX = "unknown-linux-gnu"
# Systems that zig links for without anything else of theirs, and its names of them.
_ZIG_TARGETS = {
    "x86_64-unknown-linux-gnu": "x86_64-linux-gnu",
    "aarch64-unknown-linux-gnu": "aarch64-linux-gnu",
    "riscv64-unknown-linux-gnu": "riscv64-linux-gnu",
}


def find_linker(triple: str, path: Path) -> str:
    """Return the linker of code for a triple, this machine's or another's.

    Raises LinkerNotFound, which names the library `path` and what to install.
    """
    names: tuple[str, ...] = _LINKERS
    advice = "Debian: apt install g++), or let `chat` compile by itself, which needs none"
    if triple != host_triple():
        arch, _, system = triple.partition("-")
        if system != _LINUX or not host_triple().endswith(_LINUX):
            raise LinkerNotFound(
                f"{path} is for {triple} and can only be linked on such a machine; compile it "
                "there, or to a .tar of object files for the linker that you have"
            )
        names = (f"{arch}-linux-gnu-g++", f"{arch}-linux-gnu-gcc")
        advice = (
            f"Debian: apt install g++-{arch.replace('_', '-')}-linux-gnu; or pip install ziglang)"
        )
    linker = next((found for name in names if (found := shutil.which(name))), None)
    linker = linker or _zig_linker(triple)
    if linker is None:
        raise LinkerNotFound(
            f"{path} needs a linker and none of {', '.join(names)} is installed; install one "
            f"({advice}"
        )
    return linker


def _zig_linker(triple: str) -> str | None:
    """Return a program that calls the zig of PyPI as a linker for a triple, None without one."""
    if triple not in _ZIG_TARGETS or importlib.util.find_spec("ziglang") is None:
        return None
    script = Path(tempfile.mkdtemp(prefix="mlc-llm-zig-")) / "zig-cc"
    call = f'exec "{sys.executable}" -m ziglang cc -target {_ZIG_TARGETS[triple]} "$@"'
    script.write_text(f"#!/bin/sh\n{call}\n")
    script.chmod(0o755)
    return str(script)
