"""OpenCL for TVM, whose packages on PyPI have no runtime for it: built once here, then loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from mlc_llm.errors import DeviceError
from mlc_llm.opencl import OPENCL_LIBRARY, opencl_devices
from mlc_llm.runtime.opencl.build import build_runtime

__all__ = ["load_opencl_runtime"]


def load_opencl_runtime(
    cache: Path, progress: Callable[[str], None], *, allow_cpu: bool = False
) -> None:
    """Make `opencl:0` and the following devices of TVM's runtime, which must be loaded already.

    They are those of `opencl_devices(allow_cpu=...)`, in that order; what fails on them is raised
    as DeviceError. cache: the directory where the built library is kept. May be called again.
    Raises DeviceError where there is no device, no C++ compiler, or the library does not build.
    """
    import tvm_ffi

    devices = opencl_devices(allow_cpu=allow_cpu)
    if tvm_ffi.get_global_func("device_api.opencl", allow_missing=True) is None:
        path = build_runtime(cache, progress)
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise DeviceError(
                f"{path} cannot be loaded ({error}); delete it and start again"
            ) from None
        tvm_ffi.register_error("DeviceError", DeviceError)
    set_devices = tvm_ffi.get_global_func("mlc_llm.opencl.set_devices", allow_missing=True)
    if set_devices is not None:  # else this TVM was built with an OpenCL of its own
        handles = [number for device in devices for number in (device.platform, device.handle)]
        set_devices(OPENCL_LIBRARY, handles)
