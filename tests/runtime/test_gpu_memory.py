"""Memory apart from the CPU's, with the CPU as the device that has it: everything is a copy."""

from __future__ import annotations

import numpy as np
import pytest

from mlc_llm.device import CPU
from mlc_llm.errors import DeviceError
from mlc_llm.runtime import gpu_memory
from mlc_llm.runtime.gpu_memory import GPUMemory, device_code, free_gpu_bytes
from mlc_llm.runtime.library import num_threads

pytestmark = pytest.mark.cpu


@pytest.fixture
def memory() -> GPUMemory:
    num_threads()  # loads TVM's runtime
    return GPUMemory(CPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint32", "int8"])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4), (0, 4)])
def test_there_and_back(memory, dtype, shape) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    tensor = memory.put(array)
    found = memory.array(tensor)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    if array.size:
        array[...] = 1  # what is there is a copy
        found[...] = 2
        assert not np.array_equal(memory.array(tensor), array) or array.size == 1


def test_parts_of_an_array_are_put_in_order(memory) -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2]
    np.testing.assert_array_equal(memory.array(memory.put(array)), array)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250])
def test_zeros_by_pieces(memory, monkeypatch, size) -> None:
    monkeypatch.setattr(gpu_memory, "_ZERO_PIECE_BYTES", 100)
    tensor = memory.put(np.full(size, 7, np.int8))
    memory.clear(tensor)
    np.testing.assert_array_equal(memory.array(tensor), np.zeros(size, np.int8))
    np.testing.assert_array_equal(
        memory.array(memory.zeros((size, 3), "float16")), np.zeros((size, 3), np.float16)
    )


def test_inputs_take_the_memory_of_the_last_call(memory) -> None:
    small = [np.arange(5, dtype=np.int32), np.ones((2, 3), np.int32)]
    first = memory.place(small)
    for tensor, array in zip(first, small, strict=True):
        np.testing.assert_array_equal(memory.array(tensor), array)
    large = [np.arange(5000, dtype=np.int32), np.zeros((1, 1), np.int32)]
    for tensor, array in zip(memory.place(large), large, strict=True):
        np.testing.assert_array_equal(memory.array(tensor), array)
    again = [np.arange(7, dtype=np.int32)]
    (tensor,) = memory.place(again)
    np.testing.assert_array_equal(memory.array(tensor), again[0])


def test_items_are_copied(memory) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    tensor = memory.put(array)
    for source, target in ((1, 3), (3, 0), (2, 2)):
        memory.copy_item(tensor, source, target)
    np.testing.assert_array_equal(memory.array(tensor), array[[1, 1, 2, 1]])


def test_free_memory(memory) -> None:
    assert free_gpu_bytes(CPU) > 1 << 20
    assert device_code(CPU) == 1


def test_no_room(memory) -> None:
    with pytest.raises(DeviceError, match=r"cpu:0 has no room for .* MiB more"):
        memory.empty((1 << 30, 1 << 28), "float32")


def test_fixed_inputs_stay_where_they_are(memory) -> None:
    (first, _) = memory.place_fixed([np.arange(8, dtype=np.int32)[None], np.ones(1, np.int32)], 64)
    memory.place([np.zeros(5000, np.int32)])
    later = [np.arange(100, 164, dtype=np.int32)[None], np.full(1, 7, np.int32)]
    for tensor, array in zip(memory.place_fixed(later, 64), later, strict=True):
        np.testing.assert_array_equal(memory.array(tensor), array)
    np.testing.assert_array_equal(memory.array(first), later[0][:, :8])
