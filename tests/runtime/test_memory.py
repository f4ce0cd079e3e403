"""Memory shared between NumPy and compiled code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mlc_llm.artifact import numpy_dtype
from mlc_llm.runtime.library import num_threads
from mlc_llm.runtime.memory import (
    ALIGNMENT,
    Staging,
    aligned_zeros,
    as_aligned,
    as_array,
    as_tensor,
)

DTYPES = ["float32", "float16", "bfloat16", "int32", "uint32", "int8", "uint8", "float8_e4m3fn"]


@pytest.fixture(scope="module", autouse=True)
def runtime() -> None:
    """Load TVM's runtime, without which there are no views."""
    assert num_threads() >= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1,)])
def test_tensor_and_array_are_one_memory(dtype, shape) -> None:
    array = aligned_zeros(shape, numpy_dtype(dtype))
    assert array.ctypes.data % ALIGNMENT == 0 and not array.astype(np.float32).any()
    tensor = as_tensor(array)
    assert (tuple(tensor.shape), str(tensor.dtype)) == (shape, dtype)
    back = as_array(tensor)
    assert (back.shape, back.dtype) == (shape, array.dtype)
    array[...] = 3
    np.testing.assert_array_equal(back, array)


def test_tensor_keeps_its_memory_alive() -> None:
    array = aligned_zeros((1 << 16,), np.float32)
    array[...] = 7
    tensor = as_tensor(array)
    del array
    aligned_zeros((1 << 16,), np.float32)[...] = 1
    assert (as_array(tensor) == 7).all()


def test_bfloat16_values_pass_through() -> None:
    values = np.asarray([1.5, -2.25, 3e38, np.inf], ml_dtypes.bfloat16)
    found = as_array(as_tensor(as_aligned(values)))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_only_what_is_not_aligned_is_copied() -> None:
    array = aligned_zeros((4, 16), np.float32)
    assert as_aligned(array) is array
    array[...] = np.arange(64).reshape(4, 16)
    for other in (array[:, 1:], array.T, array.reshape(-1)[1:]):
        copy = as_aligned(other)
        assert copy.ctypes.data % ALIGNMENT == 0 and copy.flags.c_contiguous
        np.testing.assert_array_equal(copy, other)


def test_staged_arrays_are_aligned_copies_that_do_not_overlap() -> None:
    staging = Staging()
    for length in (1, 17, 40_000):
        arrays = [
            np.arange(length, dtype=np.int32),
            np.asarray([], np.int32),
            np.arange(6, dtype=np.int32).reshape(2, 3) + 100,
        ]
        placed = staging.place(arrays)
        for array, copy in zip(arrays, placed, strict=True):
            assert np.array_equal(array, copy) and array.shape == copy.shape
            assert copy.ctypes.data % ALIGNMENT == 0 and copy.flags.c_contiguous
        assert np.array_equal(np.from_dlpack(as_tensor(placed[2])), arrays[2])
