"""Builds the OpenCL part of TVM's runtime from `sources/`, with the C++ compiler that is there.

Headers are those that TVM's packages bring. The result is kept under a name that changes with them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mlc_llm.errors import DeviceError

_SOURCES = Path(__file__).parent / "sources"
_COMPILERS = ("c++", "g++", "clang++")
# Inline functions of TVM stay our own: those in TVM may be of another compiler.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
_PACKAGES = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
# TVM's other symbols are found when the library is loaded.
_SYSTEM_FLAGS = {"darwin": ("-undefined", "dynamic_lookup"), "linux": ("-Wl,-Bsymbolic", "-ldl")}
_TIMEOUT_S = 1800
_SHOWN_LINES = 5


def build_runtime(cache: Path, progress: Callable[[str], None]) -> Path:
    """Return the library, built where `cache` has none for these packages and this machine.

    Raises DeviceError.
    """
    if sys.platform == "win32":
        raise DeviceError(
            "OpenCL is not supported on Windows: its C++ compilers cannot extend TVM's runtime; "
            "use --device cpu, or run mlc_llm in WSL"
        )
    path = cache / f"opencl-{_key()}.so"
    if path.is_file():
        return path
    compilers = _find_compilers()
    progress("building the OpenCL runtime: a minute or two, once")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as directory:
        built = Path(directory) / path.name
        failures = []
        for compiler in compilers:
            output = _compile(compiler, built)
            if output is None:
                os.replace(built, path)  # whole, whoever else builds at the same time
                return path
            failures.append(f"{' '.join(compiler)}: {output}")
    raise DeviceError("the OpenCL runtime could not be built by " + "; nor by ".join(failures))


def _find_compilers() -> list[list[str]]:
    """Return how to call each C++ compiler that is installed, at least one."""
    found = [[path] for name in _COMPILERS if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        found.append([sys.executable, "-m", "ziglang", "c++"])
    if not found:
        raise DeviceError(
            "OpenCL needs a C++ compiler once, to build its part of the runtime, and none of "
            f"{', '.join(_COMPILERS)} is installed; install g++ (Debian: apt install g++), or "
            "`pip install ziglang`, which brings one"
        )
    return found


def _compile(compiler: list[str], path: Path) -> str | None:
    """Compile the library; return the last lines of what the compiler said if it failed."""
    includes = [f"-I{_include(name)}" for name in _PACKAGES]
    system = _SYSTEM_FLAGS.get(sys.platform, ())
    source = str(_SOURCES / "runtime.cc")
    command = [*compiler, *_FLAGS, *includes, source, "-o", str(path), *system]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode == 0:
        return None
    return "\n".join(run.stderr.strip().splitlines()[-_SHOWN_LINES:]) or f"exit {run.returncode}"


def _include(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    for place in places:
        if (place / "include").is_dir():
            return place / "include"
    raise DeviceError(
        f"the headers of {_PACKAGES[package]} are missing, which OpenCL is built with; run "
        f"`pip install --force-reinstall {_PACKAGES[package]}`"
    )


def _key() -> str:
    """Return a name for what is built: it changes with the packages, our sources and the system."""
    digest = hashlib.sha256()
    versions = [metadata.version(name) for name in _PACKAGES.values()]
    for text in (*versions, *_FLAGS, sys.platform, platform.machine()):
        digest.update(text.encode() + b"\0")
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{versions[0]}-{digest.hexdigest()[:12]}"
