"""Loading of compiled libraries: a directory of object files (JIT) or a shared library.

Needs `tvm_ffi` and TVM's runtime library, found by path; never imports `tvm`. Checks that the
library was made for this CPU, or for the GPU it shall run on, before any of its code runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import LibraryMetadata
from mlc_llm.device import (
    CPU,
    Device,
    environment,
    export_num_threads,
    host_cpu,
    missing_features,
    parse_device,
)
from mlc_llm.errors import CorruptFile, DeviceError, LibraryError, LibraryMismatch, ModelNotFound
from mlc_llm.gpus import GPU_KINDS, find_gpu, runtime_library_of
from mlc_llm.home import cache_root
from mlc_llm.runtime.gpu_memory import device_code
from mlc_llm.runtime.opencl import load_opencl_runtime

METADATA_NAME = "metadata.json"
_CPU, _POOLED, _NAIVE = 1, 2, 1  # the first is DLPack's, the others are TVM's allocators
_MISSING_RUNTIME = re.compile(r"created using \{(\w+)\}")
# Of a 64-bit header: offset of the section table, bytes of an entry, number of entries.
_ELF64 = struct.Struct("<40xQ10xHH2x")


@dataclass(frozen=True)
class Library:
    """A loaded library: its metadata, and virtual machines over its functions."""

    metadata: LibraryMetadata
    module: Any
    path: Path
    device: Device = CPU

    def open_machine(self, *, is_pooled: bool = True) -> Any:
        """Return a virtual machine; a pooled one keeps freed memory for the next call."""
        machine = self.module["vm_load_executable"]()
        kind = _POOLED if is_pooled else _NAIVE
        places = [device_code(self.device), self.device.id, kind]
        # Shapes, which the machine computes with, are on the CPU.
        machine["vm_initialization"](*places, *((_CPU, 0, kind) if self.device.is_gpu else ()))
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


def _load_gpu_runtime(kind: str, progress: Callable[[str], None]) -> None:
    """Load what drives GPUs of a kind. Raises DeviceError."""
    _load_runtime()
    if kind == "opencl":
        cache = cache_root(environment()) / "opencl_runtime"
        load_opencl_runtime(cache, progress, allow_cpu=True)
        return
    path = runtime_library_of(kind)
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(f"TVM's runtime for {kind} cannot be loaded: {error}") from None


def num_threads() -> int:
    """Return how many threads kernels use."""
    return int(_load_runtime().get_global_func("runtime.NumThreads")())


def free_pooled_memory() -> None:
    """Give back the memory that virtual machines of this process keep but do not use now."""
    _load_runtime().get_global_func("vm.builtin.memory_manager.clear")()


def load_library(
    path: Path, device: str = "auto", progress: Callable[[str], None] = lambda _: None
) -> Library:
    """Load a library from a directory of objects or a shared library file.

    device: where it shall run, by name; `auto` is what it was compiled for. progress: told where
    something must be built first, as OpenCL's runtime. Raises ModelNotFound,
    CorruptFile, LibraryError, LibraryMismatch or DeviceError.
    """
    if path.is_dir():
        metadata = _read_directory_metadata(path)
        place = _check_device(metadata, path, device, progress)
        module = _load_objects(path)
    elif path.is_file():
        module = _load_shared(path, progress)
        metadata = _metadata_of(module, path)
        place = _check_device(metadata, path, device, progress)
    else:
        raise ModelNotFound(f"library {path} does not exist; compile it with `mlc_llm compile`")
    return Library(metadata, module, path, place)


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


def _load_shared(path: Path, progress: Callable[[str], None]) -> Any:
    _check_elf_size(path)
    _load_runtime()
    try:
        return _open_shared(path)
    except (RuntimeError, ValueError, OSError) as error:
        # What its code for a GPU needs is known when it has been opened.
        gpu = _MISSING_RUNTIME.search(str(error))
        if gpu is not None and gpu[1] in GPU_KINDS:
            return _open_for_gpu(path, gpu[1], progress)
        raise LibraryError(
            f"{path} cannot be loaded as a library ({_last_line(error)}); compile it again on "
            "this kind of machine"
        ) from None


def _open_shared(path: Path) -> Any:
    # The system's loader would look for a bare file name in its own directories.
    return _load_runtime().load_module(str(path.absolute()))


def _open_for_gpu(path: Path, kind: str, progress: Callable[[str], None]) -> Any:
    _require_gpu(Device(kind), path, progress)
    try:
        return _open_shared(path)
    except (RuntimeError, ValueError, OSError) as error:
        raise LibraryError(
            f"{path} cannot be loaded by the driver of {kind} ({_last_line(error)}); compile it "
            "again on this machine"
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
        machine["vm_initialization"](_CPU, 0, _NAIVE)  # enough for what it says of itself
        text = str(machine["_metadata"]())
    except (AttributeError, RuntimeError, ValueError, KeyError) as error:
        raise LibraryError(
            f"{path} is not a library made by mlc_llm ({_last_line(error)}); compile it again"
        ) from None
    return LibraryMetadata.from_json(text, str(path))


def _check_device(
    metadata: LibraryMetadata, path: Path, device: str, progress: Callable[[str], None]
) -> Device:
    """Return where a library runs. Raises LibraryMismatch or DeviceError."""
    wanted = None if device == "auto" else parse_device(device)
    kind = metadata.target.get("kind", "llvm")
    if kind == "webgpu":
        raise LibraryMismatch(
            f"{path} was compiled for webgpu and is run in a browser, with web-llm; compile it for "
            "a device of this machine"
        )
    name = "cpu" if kind == "llvm" else kind
    if wanted is not None and wanted.name != name:
        raise LibraryMismatch(
            f"{path} was compiled for {name}, the device is {wanted}; use --device {name}, or "
            f"compile it for {wanted.name}"
        )
    if name == "cpu":
        _check_isa(metadata, path)
        return CPU
    triple = metadata.target["host"]["mtriple"]
    arch = triple.partition("-")[0].replace("arm64", "aarch64")
    if arch != host_cpu().arch or triple.endswith(("-android", "-ios")):
        raise LibraryMismatch(
            f"{path} was compiled for {kind} and {triple}, and is run there; compile it for a "
            "device of this machine"
        )
    place = wanted or Device(name)
    _require_gpu(place, path, progress)
    return place


def _require_gpu(device: Device, path: Path, progress: Callable[[str], None]) -> None:
    """Load what drives a GPU. Raises DeviceError where it is not there."""
    try:
        find_gpu(device.name, device.id)
    except DeviceError as error:
        raise DeviceError(
            f"{path} was compiled for {device.name}: {error}; compile it for this machine's CPU"
        ) from None
    _load_gpu_runtime(device.name, progress)


def _check_isa(metadata: LibraryMetadata, path: Path) -> None:
    cpu = host_cpu()
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
