"""GPUs of this machine: which there are and, for each kind, why there is none that can be used.

Asks drivers alone, by ctypes; imports no TVM and starts nothing on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.errors import DeviceError
from mlc_llm.opencl import opencl_devices

# Kinds of GPUs in the order of automatic detection, and their numbers in DLPack.
GPU_KINDS = {"cuda": 2, "rocm": 10, "metal": 8, "vulkan": 7, "opencl": 4}
# What stands in the way of kinds that TVM's packages from PyPI have no runtime for.
_NO_RUNTIME = {
    "rocm": "TVM's packages from PyPI have no runtime for AMD's ROCm; build TVM with USE_ROCM=ON",
    "vulkan": "TVM's packages from PyPI have no runtime for Vulkan; build TVM with USE_VULKAN=ON",
}
_CUDA_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CUDA_RUNTIME = "cudart64_13.dll" if sys.platform == "win32" else "libcudart.so.13"
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # of CUdevice_attribute
_NAME_BYTES = 256


@dataclass(frozen=True)
class GPU:
    """A GPU that libraries can run on. architecture: as in sm_90, where its kind has such names."""

    kind: str
    id: int
    name: str
    memory_bytes: int | None = None
    architecture: str | None = None


@functools.cache
def gpus_of(kind: str) -> tuple[GPU, ...]:
    """Return the GPUs of a kind, at least one. Raises DeviceError that says why there is none."""
    if kind in _NO_RUNTIME:
        raise DeviceError(_NO_RUNTIME[kind])
    return {"cuda": _cuda_gpus, "metal": _metal_gpus, "opencl": _opencl_gpus}[kind]()


def find_gpu(kind: str, index: int) -> GPU:
    """Return a GPU by its number. Raises DeviceError."""
    gpus = gpus_of(kind)
    if index >= len(gpus):
        names = ", ".join(f"{gpu.kind}:{gpu.id} ({gpu.name})" for gpu in gpus)
        raise DeviceError(f"there is no {kind}:{index} here; there is {names}")
    return gpus[index]


def first_gpu(kinds: Iterable[str]) -> GPU | None:
    """Return the first GPU of the first kind that has any, None where no kind has."""
    for kind in kinds:
        with contextlib.suppress(DeviceError):
            return gpus_of(kind)[0]
    return None


def cuda_architecture(index: int) -> str | None:
    """Return the architecture of an NVIDIA GPU of this machine, as in sm_90, None without it."""
    try:
        return _ask_cuda()[index].architecture
    except (DeviceError, IndexError):
        return None


def _cuda_gpus() -> tuple[GPU, ...]:
    gpus = _ask_cuda()
    runtime_library_of("cuda")
    _load_cuda_runtime()
    return gpus


@functools.cache
def _ask_cuda() -> tuple[GPU, ...]:
    """Return NVIDIA's GPUs as the driver tells them. Raises DeviceError."""
    try:
        driver = ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        raise DeviceError(f"NVIDIA's driver ({_CUDA_DRIVER}) is not installed") from None
    count = ctypes.c_int()
    for function, arguments in (("cuInit", (0,)), ("cuDeviceGetCount", (ctypes.byref(count),))):
        if code := getattr(driver, function)(*arguments):
            raise DeviceError(f"NVIDIA's driver answers {function} with error {code}")
    if not count.value:
        raise DeviceError("NVIDIA's driver finds no GPU; is it hidden by CUDA_VISIBLE_DEVICES?")
    return tuple(_cuda_gpu(driver, index) for index in range(count.value))


def _cuda_gpu(driver: Any, index: int) -> GPU:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    codes = [driver.cuDeviceGet(ctypes.byref(device), index)]
    for number, attribute in ((major, _COMPUTE_MAJOR), (minor, _COMPUTE_MINOR)):
        codes.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
    codes.append(driver.cuDeviceGetName(name, _NAME_BYTES, device))
    codes.append(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    if any(codes):
        raise DeviceError(f"NVIDIA's driver does not describe cuda:{index} (error {max(codes)})")
    architecture = f"sm_{major.value}{minor.value}"
    return GPU("cuda", index, name.value.decode(errors="replace"), memory.value, architecture)


def _metal_gpus() -> tuple[GPU, ...]:
    if sys.platform != "darwin":
        raise DeviceError("Metal is there on Apple's systems only")
    runtime_library_of("metal")
    return (GPU("metal", 0, "Apple GPU"),)


def _opencl_gpus() -> tuple[GPU, ...]:
    devices = enumerate(opencl_devices(allow_cpu=True))
    return tuple(GPU("opencl", index, d.name, d.memory_bytes) for index, d in devices)


def runtime_library_of(kind: str) -> Path:
    """Return the part of TVM's runtime that drives GPUs of a kind. Raises DeviceError."""
    spec = importlib.util.find_spec("tvm")
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    prefix, suffix = {"darwin": ("lib", "dylib"), "win32": ("", "dll")}.get(
        sys.platform, ("lib", "so")
    )
    for place in places:
        path = place / "lib" / f"{prefix}tvm_runtime_{kind}.{suffix}"
        if path.is_file():
            return path
    raise DeviceError(f"the installed apache-tvm has no runtime for {kind}")


def _load_cuda_runtime() -> None:
    """Load NVIDIA's runtime library, of the system or of its package from PyPI."""
    package = importlib.util.find_spec("nvidia")
    places = [] if package is None else list(package.submodule_search_locations or [])
    packaged = [path for place in places for path in Path(place).rglob(_CUDA_RUNTIME)]
    for path in (_CUDA_RUNTIME, *map(str, packaged)):
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise DeviceError(
        f"NVIDIA's CUDA runtime ({_CUDA_RUNTIME}) is not installed; `pip install mlc_llm[cuda]`, "
        "or install the CUDA toolkit 13"
    )
