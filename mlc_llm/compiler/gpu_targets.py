"""GPUs by the names that users give them: TVM's target, the system that goes with it, or why not.

Does not import TVM.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlc_llm.errors import DeviceError, OptionError
from mlc_llm.gpus import cuda_architecture

# NVIDIA's architectures that TVM's CUDA code runs on, and a GPU of each.
CUDA_ARCHITECTURES = {
    "sm_70": "V100",
    "sm_75": "T4, RTX 20",
    "sm_80": "A100",
    "sm_86": "RTX 30, A10",
    "sm_87": "Jetson Orin",
    "sm_89": "RTX 40, L4",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 50",
}
# Devices that libraries are made for and no machine finds among its own.
COMPILED_ONLY = ("webgpu", "android", "iphone")
_ROCM_LIBRARIES = Path("/opt/rocm/amdgcn/bitcode")
_SHARED_BYTES = 49152  # of a CUDA block, without asking for more


def gpu_target(device: str) -> dict[str, Any] | None:
    """Return TVM's target of a GPU by name, None for what is no GPU.

    It has a key `host`, the triple of the system that goes with it, which is None for this
    machine's. Raises DeviceError for a GPU that code cannot be made for here.
    """
    name, _, detail = device.partition(":")
    make = _GPUS.get(name)
    return None if make is None else make(device, detail)


def _webgpu(device: str, detail: str) -> dict[str, Any]:
    _require_no_detail(device, detail)
    return {"kind": "webgpu", "host": "wasm32-unknown-unknown-wasm"}


def _metal(device: str, detail: str) -> dict[str, Any]:
    _refuse_index(device, detail)
    return {"kind": "metal", "host": "arm64-apple-macosx"}


def _iphone(device: str, detail: str) -> dict[str, Any]:
    _require_no_detail(device, detail)
    return {"kind": "metal", "host": "arm64-apple-ios"}


def _opencl(device: str, detail: str) -> dict[str, Any]:
    _refuse_index(device, detail)
    return {"kind": "opencl", "host": None}


def _android(device: str, detail: str) -> dict[str, Any]:
    _require_no_detail(device, detail)
    return {"kind": "opencl", "host": "aarch64-linux-android"}


def _cuda(device: str, detail: str) -> dict[str, Any]:
    known = ", ".join(f"{arch} ({gpu})" for arch, gpu in CUDA_ARCHITECTURES.items())
    arch = detail
    if re.fullmatch(r"\d*", detail):
        found = cuda_architecture(int(detail or 0))
        if found is None:
            raise DeviceError(
                f"device {device!r}: there is no such NVIDIA GPU here (no driver, or no GPU of "
                f"this number); say which one the library is for, as in cuda:sm_90: {known}"
            )
        arch = found
    elif arch not in CUDA_ARCHITECTURES:
        raise OptionError(
            f"device {device!r}: architecture {arch!r} is not known; use one of {known}"
        )
    return {
        "kind": "cuda",
        "arch": arch,
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": _SHARED_BYTES,
        "host": None,
    }


def _rocm(device: str, detail: str) -> dict[str, Any]:
    if not _ROCM_LIBRARIES.is_dir():
        raise DeviceError(
            f"device {device!r}: code for AMD GPUs is linked with ROCm's device libraries, and "
            f"{_ROCM_LIBRARIES} is not there; install ROCm (package rocm-device-libs), or use "
            "--device opencl"
        )
    if not re.fullmatch(r"gfx[0-9a-f]+", detail):
        raise OptionError(f"device {device!r}: say which GPU it is for, as in rocm:gfx1100")
    return {"kind": "rocm", "mcpu": detail, "host": None}


def _vulkan(device: str, _: str) -> dict[str, Any]:
    raise DeviceError(
        f"device {device!r}: the TVM that is installed, like all from PyPI, was built without "
        "Vulkan; build TVM with USE_VULKAN=ON and install it, or use --device opencl or webgpu"
    )


_GPUS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "cuda": _cuda,
    "metal": _metal,
    "opencl": _opencl,
    "webgpu": _webgpu,
    "rocm": _rocm,
    "vulkan": _vulkan,
    "android": _android,
    "iphone": _iphone,
}


def _require_no_detail(device: str, detail: str) -> None:
    if detail:
        raise OptionError(f"device {device!r}: write {device.partition(':')[0]} alone")


def _refuse_index(device: str, detail: str) -> None:
    if detail and not detail.isdigit():
        raise OptionError(f"device {device!r}: {detail!r} is no number of a device")
