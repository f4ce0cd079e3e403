"""Memory that compiled code may use in place: aligned NumPy arrays and TVM views of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import numpy_dtype

# What TVM demands of memory that comes from outside.
ALIGNMENT = 64
# DLPack as NumPy speaks it lacks these; they travel as raw integers and are relabelled.
_RELABELLED: dict[Any, tuple[Any, str]] = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, "bfloat16"),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, "float8_e4m3fn"),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, "float8_e5m2"),
}


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return zeros whose address is a multiple of 64; pages of it are taken when first written."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    array: NDArray[Any] = raw[offset : offset + size].view(dtype).reshape(shape)
    return array


def as_aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array itself if it is contiguous and aligned, else a copy that is."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


class Staging:
    """Aligned int32 memory for the small arrays of a call, written anew by the next one."""

    def __init__(self) -> None:
        self._memory = aligned_zeros((1 << 14,), np.int32)

    def place(self, arrays: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
        """Return copies of arrays that compiled code may read until the next call."""
        step = ALIGNMENT // 4
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] + -(-array.size // step) * step)
        if starts[-1] > self._memory.size:
            self._memory = aligned_zeros((2 * starts[-1],), np.int32)
        placed = []
        for array, start in zip(arrays, starts, strict=False):
            copy = self._memory[start : start + array.size].reshape(array.shape)
            copy[...] = array
            placed.append(copy)
        return placed


def as_tensor(array: NDArray[Any]) -> Any:
    """Return a TVM tensor on the memory of an aligned, writable array, which it keeps alive."""
    import tvm_ffi

    raw = array.view(np.ndarray)
    relabel = _RELABELLED.get(raw.dtype)
    if relabel is not None:
        stored, dtype = relabel
        tensor = tvm_ffi.from_dlpack(raw.view(stored))
        view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        return view(tensor, tvm_ffi.Shape(raw.shape), tvm_ffi.dtype(dtype), 0)
    return tvm_ffi.from_dlpack(raw)


def as_array(tensor: Any) -> NDArray[Any]:
    """Return a NumPy array on the memory of a TVM tensor, which it keeps alive."""
    dtype = str(tensor.dtype)
    if dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import tvm_ffi

        stored = "uint16" if dtype == "bfloat16" else "uint8"
        view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        raw = view(tensor, tvm_ffi.Shape(tensor.shape), tvm_ffi.dtype(stored), 0)
        result: NDArray[Any] = np.from_dlpack(raw).view(np.dtype(getattr(ml_dtypes, dtype)))
        return result
    return np.from_dlpack(tensor)


class HostMemory:
    """Makes, fills and reads tensors on the CPU, where arrays and tensors share memory."""

    def __init__(self) -> None:
        self._staging = Staging()

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Return a tensor of zeros, whose memory is taken when it is first written."""
        return as_tensor(aligned_zeros(tuple(shape), numpy_dtype(dtype)))

    def clear(self, tensor: Any) -> None:
        """Write zeros."""
        as_array(tensor)[...] = 0

    def put(self, array: NDArray[Any]) -> Any:
        """Return a tensor on the memory of an array, or on a copy where that is not aligned."""
        return as_tensor(as_aligned(array))

    def place(self, arrays: Sequence[NDArray[np.int32]]) -> list[Any]:
        """Return tensors of small arrays for a call; the next call's take their memory."""
        return [as_tensor(array) for array in self._staging.place(arrays)]

    def array(self, tensor: Any) -> NDArray[Any]:
        """Return a tensor's content, which changes with it."""
        return as_array(tensor)

    def copy_item(self, tensor: Any, source: int, target: int) -> None:
        """Copy an item of the first dimension over another one."""
        array = as_array(tensor)
        array[target] = array[source]
