"""TVM's runtime as WebAssembly: built from the sources that its packages bring, and kept.

A few headers are in none of the packages; `sources/` holds our own. What a browser has no use for
(remote sessions, sorting on the CPU) is left out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mlc_llm.compiler.browser.emscripten import run_emscripten, version_of
from mlc_llm.errors import CompileError

# Parts of the runtime: the first is small and the last takes minutes.
_PARTS = ("webgpu_runtime", "tvmjs_support", "wasm_runtime")
# Sources that the runtime includes and a browser does without.
_LEFT_OUT = (
    *(f"src/runtime/rpc/rpc_{name}.cc" for name in ("channel", "endpoint", "event_impl")),
    *("src/runtime/extra/contrib/sort/sort.cc", "src/support/utils.h"),
)
_INCLUDES = (
    *(".", "include", "3rdparty/tvm-ffi/include"),
    "3rdparty/tvm-ffi/3rdparty/dlpack/include",
)
_FLAGS = ("-O3", "-std=c++17", "-Wno-ignored-attributes")
_SOURCES = Path(__file__).parent / "sources"


def runtime_objects(program: str, cache: Path, progress: Callable[[str], None]) -> list[Path]:
    """Return the object files of the runtime, built where `cache` has none for these packages.

    program: Emscripten's compiler. Raises CompileError.
    """
    directory = cache / _key(program)
    objects = [directory / f"{part}.o" for part in _PARTS]
    if all(path.is_file() for path in objects):
        return objects
    cache.mkdir(parents=True, exist_ok=True)
    progress("building TVM's runtime for the browser: some minutes, once")
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as work:
        tree, built = Path(work) / "tvm", Path(work) / "built"
        _lay_out_sources(tree)
        built.mkdir()
        includes = [f"-I{tree / include}" for include in _INCLUDES]
        for number, part in enumerate(_PARTS, 1):
            progress(f"building {part} ({number} of {len(_PARTS)})")
            source, result = tree / f"web/emcc/{part}.cc", built / f"{part}.o"
            arguments = [*_FLAGS, *includes, "-c", str(source), "-o", str(result)]
            run_emscripten(program, arguments, "building TVM's runtime with")
        _put_in_place(built, directory)
    return objects


def _put_in_place(built: Path, directory: Path) -> None:
    try:
        os.rename(built, directory)
    except OSError:
        # Another process was first, or what is there is not whole.
        directory.mkdir(exist_ok=True)
        for path in built.iterdir():
            os.replace(path, directory / path.name)


def _lay_out_sources(tree: Path) -> None:
    """Copy the sources of the runtime, as their includes expect them, and ours."""
    tvm, ffi = _package("tvm"), _package("tvm_ffi")
    places = [
        (tvm / "src", "src"),
        (tvm / "include", "include"),
        (tvm / "web/emcc", "web/emcc"),
        (ffi / "src", "3rdparty/tvm-ffi/src"),
        (ffi / "include", "3rdparty/tvm-ffi/include"),
        (ffi / "3rdparty/dlpack", "3rdparty/tvm-ffi/3rdparty/dlpack"),
        (_SOURCES, "."),
    ]
    for source, place in places:
        if not source.is_dir():
            raise CompileError(
                f"{source} is missing, which TVM's runtime for the browser is built from; install "
                "apache-tvm and apache-tvm-ffi from PyPI"
            )
        shutil.copytree(source, tree / place, dirs_exist_ok=True)
    for name in _LEFT_OUT:
        (tree / name).write_text("")  # nothing of these is used


def _key(program: str) -> str:
    """Return a name for what is built: it changes with the packages, our sources and Emscripten."""
    digest = hashlib.sha256()
    versions = [metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")]
    for text in (*versions, version_of(program), *_FLAGS, *_LEFT_OUT):
        digest.update(text.encode() + b"\0")
    for path in sorted(_SOURCES.rglob("*.*")):
        digest.update(path.relative_to(_SOURCES).as_posix().encode() + path.read_bytes())
    return f"tvm-{versions[0]}-{digest.hexdigest()[:12]}"


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
