"""OpenCL's devices of this machine, asked of the system's library by ctypes.

Starts nothing on them and builds nothing: `runtime/opencl` does, with the handles found here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from ctypes import byref, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

from mlc_llm.errors import DeviceError

OPENCL_LIBRARY = {
    "darwin": "/System/Library/Frameworks/OpenCL.framework/OpenCL",
    "win32": "OpenCL.dll",
}.get(sys.platform, "libOpenCL.so.1")
# Types of devices by their bit, in the order in which they are numbered.
_TYPES = {1 << 2: "gpu", 1 << 3: "accelerator", 1 << 1: "cpu"}
_ALL_TYPES = 0xFFFFFFFF
_TYPE, _MEMORY, _AVAILABLE, _COMPILER_AVAILABLE, _NAME = 0x1000, 0x101F, 0x1027, 0x1028, 0x102B
_MAX_HANDLES, _MAX_NAME_BYTES = 64, 1024
_INSTALL = (
    "install the driver of your GPU (Debian: intel-opencl-icd for Intel, mesa-opencl-icd for AMD)"
)


@dataclass(frozen=True)
class OpenCLDevice:
    """A device that kernels can be compiled for.

    type: gpu, accelerator or cpu. platform and handle are OpenCL's names of it in this process.
    """

    name: str
    type: str
    memory_bytes: int
    platform: int
    handle: int


def opencl_devices(*, allow_cpu: bool = False) -> list[OpenCLDevice]:
    """Return the devices of all platforms in the order of their numbers, at least one.

    GPUs come first. allow_cpu: with drivers that compute on the CPU, as pocl, where `--device cpu`
    is faster by far. Raises DeviceError that says why there is none.
    """
    try:
        library = ctypes.CDLL(OPENCL_LIBRARY)
    except OSError:
        raise DeviceError(f"OpenCL ({OPENCL_LIBRARY}) is not installed; {_INSTALL}") from None
    order = list(_TYPES.values())
    found = sorted(_all_devices(library), key=lambda device: order.index(device.type))
    devices = [device for device in found if allow_cpu or device.type != "cpu"]
    if not devices and found:
        names = ", ".join(device.name for device in found)
        raise DeviceError(f"OpenCL finds no GPU, only {names}; {_INSTALL}")
    if not devices:
        raise DeviceError(f"OpenCL is installed but finds no device; {_INSTALL}")
    return devices


def _all_devices(library: ctypes.CDLL) -> Iterator[OpenCLDevice]:
    for platform in _handles(library.clGetPlatformIDs):
        of_platform = (c_void_p(platform), c_uint64(_ALL_TYPES))
        for handle in _handles(library.clGetDeviceIDs, *of_platform):
            device = _describe(library, platform, handle)
            if device is not None:
                yield device


def _handles(function: ctypes._NamedFuncPointer, *arguments: object) -> list[int]:
    """Return what a function of OpenCL lists, [] where it lists nothing."""
    handles, count = (c_void_p * _MAX_HANDLES)(), c_uint32()
    if function(*arguments, c_uint32(_MAX_HANDLES), handles, byref(count)):
        return []
    return [handle for handle in handles[: count.value] if handle is not None]


def _describe(library: ctypes.CDLL, platform: int, handle: int) -> OpenCLDevice | None:
    """Return a device, None for one that cannot be used."""

    def ask(what: int, answer: ctypes._CData) -> bool:
        size = ctypes.c_size_t(ctypes.sizeof(answer))
        arguments = (c_void_p(handle), c_uint32(what), size, byref(answer), None)
        return bool(library.clGetDeviceInfo(*arguments) == 0)

    bits, memory, name = c_uint64(), c_uint64(), (ctypes.c_char * _MAX_NAME_BYTES)()
    flags = [c_uint32(), c_uint32()]
    answered = ask(_TYPE, bits) and ask(_MEMORY, memory) and ask(_NAME, name)
    usable = ask(_AVAILABLE, flags[0]) and ask(_COMPILER_AVAILABLE, flags[1])
    kind = next((kind for bit, kind in _TYPES.items() if bits.value & bit), None)
    if kind is None or not (answered and usable and all(flag.value for flag in flags)):
        return None
    text = " ".join(name.value.decode(errors="replace").split())
    return OpenCLDevice(text, kind, memory.value, platform, handle)
