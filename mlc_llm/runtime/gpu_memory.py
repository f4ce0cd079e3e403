"""Tensors in the memory of a GPU, and how arrays come there and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import numpy_dtype
from mlc_llm.device import Device
from mlc_llm.errors import DeviceError
from mlc_llm.gpus import GPU_KINDS

_CPU = 1  # DLPack's number
# Of TVM's device attributes: memory in all, and what of it is free.
_TOTAL_MEMORY, _AVAILABLE_MEMORY = 14, 15
_ZERO_PIECE_BYTES = 64 << 20
_FLOAT8 = (numpy_dtype("float8_e4m3fn"), numpy_dtype("float8_e5m2"))


def device_code(device: Device) -> int:
    """Return a device's kind as DLPack numbers it."""
    return GPU_KINDS.get(device.name, _CPU)


def free_gpu_bytes(device: Device) -> int:
    """Return the memory of a GPU that is free, or all of it where the driver does not tell.

    Needs the runtime to be loaded. Raises DeviceError.
    """
    import tvm_ffi

    ask = tvm_ffi.get_global_func("runtime.GetDeviceAttr")
    for attribute in (_AVAILABLE_MEMORY, _TOTAL_MEMORY):
        found = ask(device_code(device), device.id, attribute)
        if found:
            return int(found)
    raise DeviceError(f"the driver of {device} does not tell how much memory it has")


class GPUMemory:
    """Makes, fills and reads tensors of one device."""

    def __init__(self, device: Device) -> None:
        import tvm_ffi

        def function(name: str) -> Any:
            return tvm_ffi.get_global_func(f"runtime.TVMTensor{name}")

        self._ffi = tvm_ffi
        self._name = str(device)
        self._device = tvm_ffi.device(device_code(device), device.id)
        self._alloc, self._view = function("AllocWithScope"), function("CreateView")
        self._copy_in, self._copy_out = function("CopyFromBytes"), function("CopyToBytes")
        self.copy = function("CopyFromTo")  # from a tensor to another
        self._wait = tvm_ffi.get_global_func("runtime.Device_StreamSync")
        self._inputs: list[Any] = []
        self._fixed_inputs: list[Any] = []

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Return a tensor of whatever values. Raises DeviceError."""
        shape_, dtype_ = self._ffi.Shape(tuple(shape)), self._ffi.dtype(dtype)
        try:
            return self._alloc(shape_, dtype_, self._device, None)
        except RuntimeError as error:
            size = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(
                f"{self._name} has no room for {size / 2**20:,.0f} MiB more ({reason}); take a "
                "smaller model, or lower context_window_size with --overrides"
            ) from None

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Return a tensor of zeros. Raises DeviceError."""
        tensor = self.empty(shape, dtype)
        self.clear(tensor)
        return tensor

    def clear(self, tensor: Any) -> None:
        """Write zeros: a piece from here, which the GPU then copies over the others."""
        size = int(np.prod(tensor.shape, dtype=np.int64)) * numpy_dtype(str(tensor.dtype)).itemsize
        piece = min(size, _ZERO_PIECE_BYTES)
        first = self._bytes_of(tensor, 0, piece)
        self._fill(first, np.zeros(piece, np.uint8))
        for start in range(piece, size, piece or 1):
            count = min(piece, size - start)
            self.copy(self._bytes_of(first, 0, count), self._bytes_of(tensor, start, count))

    def put(self, array: NDArray[Any]) -> Any:
        """Return a tensor with the content of an array. Raises DeviceError.

        8-bit floats come as words of four, uint32, which kernels of all GPUs can read.
        """
        if array.dtype in _FLOAT8:
            array = np.ascontiguousarray(array).view(np.uint32)
        tensor = self.empty(array.shape, array.dtype.name)
        self._fill(tensor, array)
        return tensor

    def place(self, arrays: Sequence[NDArray[Any]]) -> list[Any]:
        """Return tensors of small arrays for a call; the next call's take their memory."""
        placed = []
        for index, array in enumerate(arrays):
            if index == len(self._inputs):
                self._inputs.append(self.empty((1024,), array.dtype.name))
            room = self._inputs[index]
            if array.size > int(room.shape[0]):
                room = self._inputs[index] = self.empty((2 * array.size,), array.dtype.name)
            placed.append(self._placed(room, array))
        return placed

    def place_fixed(self, arrays: Sequence[NDArray[np.int32]], max_items: int) -> list[Any]:
        """Return tensors of the arrays of a call; the next call's are at the same addresses.

        max_items: what the largest array of any call has.
        """
        while len(self._fixed_inputs) < len(arrays):
            self._fixed_inputs.append(self.empty((max_items,), "int32"))
        return [
            self._placed(room, array)
            for room, array in zip(self._fixed_inputs, arrays, strict=False)
        ]

    def _placed(self, room: Any, array: NDArray[Any]) -> Any:
        view = self._view(room, self._ffi.Shape(array.shape), room.dtype, 0)
        self._fill(view, array)
        return view

    def array(self, tensor: Any) -> NDArray[Any]:
        """Return a tensor's content, in memory of its own."""
        array = np.empty(tuple(tensor.shape), numpy_dtype(str(tensor.dtype)))
        if array.nbytes:
            self._copy_out(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return array

    def copy_item(self, tensor: Any, source: int, target: int) -> None:
        """Copy an item of the first dimension over another one."""
        if source != target:
            size = int(np.prod(tensor.shape[1:], dtype=np.int64))
            size *= numpy_dtype(str(tensor.dtype)).itemsize
            self.copy(*(self._bytes_of(tensor, item * size, size) for item in (source, target)))

    def wait(self) -> None:
        """Return when all that was started has ended."""
        self._wait(self._device, 0)

    def _bytes_of(self, tensor: Any, start: int, count: int) -> Any:
        return self._view(tensor, self._ffi.Shape((count,)), self._ffi.dtype("uint8"), start)

    def _fill(self, tensor: Any, array: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array)
        if raw.nbytes:
            self._copy_in(tensor, raw.ctypes.data_as(ctypes.c_void_p), raw.nbytes)
