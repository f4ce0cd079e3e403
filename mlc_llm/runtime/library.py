"""Loading of compiled libraries: a directory of object files (JIT) or a shared library.

Needs `tvm_ffi` and TVM's runtime library, found by path; never imports `tvm`. Checks that the
library was made for this CPU before any of its code runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import LibraryMetadata
from mlc_llm.device import export_num_threads, host_cpu, missing_features
from mlc_llm.errors import CorruptFile, LibraryError, LibraryMismatch, ModelNotFound

METADATA_NAME = "metadata.json"
_CPU, _POOLED, _NAIVE = 1, 2, 1
# Of a 64-bit header: offset of the section table, bytes of an entry, number of entries.
_ELF64 = struct.Struct("<40xQ10xHH2x")


@dataclass(frozen=True)
class Library:
    """A loaded library: its metadata, and virtual machines over its functions."""

    metadata: LibraryMetadata
    module: Any
    path: Path

    def open_machine(self, *, is_pooled: bool = True) -> Any:
        """Return a virtual machine; a pooled one keeps freed memory for the next call."""
        machine = self.module["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED if is_pooled else _NAIVE)
        return machine


@functools.cache
def _load_runtime() -> Any:
    """Load TVM's runtime library once and return `tvm_ffi`."""
    export_num_threads()  # the thread pool reads its size once
    import tvm_ffi

    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise LibraryError("apache-tvm is not installed; run `pip install mlc_llm` again")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    prefix = "" if sys.platform == "win32" else "lib"
    for stem in ("tvm_runtime", "tvm_runtime_extra"):
        path = folder / f"{prefix}{stem}.{suffix}"
        if path.is_file():
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        elif stem == "tvm_runtime":
            raise LibraryError(f"{path} is missing; run `pip install --force-reinstall apache-tvm`")
    return tvm_ffi


def num_threads() -> int:
    """Return how many threads kernels use."""
    return int(_load_runtime().get_global_func("runtime.NumThreads")())


def free_pooled_memory() -> None:
    """Give back the memory that virtual machines of this process keep but do not use now."""
    _load_runtime().get_global_func("vm.builtin.memory_manager.clear")()


def load_library(path: Path) -> Library:
    """Load a library from a directory of objects or a shared library file.

    Raises ModelNotFound, CorruptFile, LibraryError or LibraryMismatch.
    """
    if path.is_dir():
        metadata = _read_directory_metadata(path)
        _check_isa(metadata, path)
        module = _load_objects(path)
    elif path.is_file():
        module = _load_shared(path)
        metadata = _metadata_of(module, path)
        _check_isa(metadata, path)
    else:
        raise ModelNotFound(f"library {path} does not exist; compile it with `mlc_llm compile`")
    return Library(metadata, module, path)


def _read_directory_metadata(directory: Path) -> LibraryMetadata:
    path = directory / METADATA_NAME
    if not path.is_file():
        raise LibraryError(f"{directory} is not a compiled library: it has no {METADATA_NAME}")
    # Bytes that are no text become characters that JSON refuses.
    text = path.read_text(encoding="utf-8", errors="replace")
    return LibraryMetadata.from_json(text, str(path))


def _load_objects(directory: Path) -> Any:
    _load_runtime()
    from tvm_ffi_orcjit import default_session

    objects = sorted(str(path) for path in directory.glob("*.o"))
    if not objects:
        raise LibraryError(f"{directory} has no object files; delete it and start again")
    try:
        return default_session().load_module(objects)
    except (RuntimeError, ValueError, OSError) as error:
        raise LibraryError(
            f"{directory} cannot be loaded ({_last_line(error)}); delete it and start again"
        ) from None


def _load_shared(path: Path) -> Any:
    _check_elf_size(path)
    tvm_ffi = _load_runtime()
    try:
        # The system's loader would look for a bare file name in its own directories.
        return tvm_ffi.load_module(str(path.absolute()))
    except (RuntimeError, ValueError, OSError) as error:
        raise LibraryError(
            f"{path} cannot be loaded as a library ({_last_line(error)}); compile it again on "
            "this kind of machine"
        ) from None


def _check_elf_size(path: Path) -> None:
    """Raise CorruptFile for a truncated ELF file: the system's loader would crash on it."""
    with path.open("rb") as stream:
        header = stream.read(_ELF64.size)
    if len(header) < _ELF64.size or header[:6] != b"\x7fELF\x02\x01":
        return
    table_offset, entry_bytes, num_entries = _ELF64.unpack(header)
    end = table_offset + entry_bytes * num_entries  # linkers put this table last
    if end > path.stat().st_size:
        raise CorruptFile(
            f"{path} is truncated: it has {path.stat().st_size:,} bytes of at least {end:,}; "
            "compile it again"
        )


def _metadata_of(module: Any, path: Path) -> LibraryMetadata:
    try:
        machine = module["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _NAIVE)
        text = str(machine["_metadata"]())
    except (AttributeError, RuntimeError, ValueError, KeyError) as error:
        raise LibraryError(
            f"{path} is not a library made by mlc_llm ({_last_line(error)}); compile it again"
        ) from None
    return LibraryMetadata.from_json(text, str(path))


def _check_isa(metadata: LibraryMetadata, path: Path) -> None:
    cpu, kind = host_cpu(), metadata.target.get("kind", "llvm")
    if kind != "llvm":
        runs = "in a browser, with web-llm" if kind == "webgpu" else "by programs that know TVM"
        raise LibraryMismatch(
            f"{path} was compiled for {kind} and is run {runs}; compile it for this machine's CPU"
        )
    arch, *needed = metadata.isa
    if arch != cpu.arch:
        raise LibraryMismatch(
            f"{path} was compiled for {arch} CPUs, this machine is {cpu.arch}; compile it again"
        )
    missing = missing_features(needed)
    if missing:
        raise LibraryMismatch(
            f"{path} needs the CPU features {', '.join(missing)}; this CPU ({cpu.model}) has "
            f"{', '.join(cpu.isa)}; compile the library again on this machine"
        )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
