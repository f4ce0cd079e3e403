"""Our OpenCL runtime for TVM: memory, kernels, and what is said where something is missing."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opencl_programs import build_chain, library_code

import mlc_llm.opencl
from mlc_llm.device import Device
from mlc_llm.errors import DeviceError
from mlc_llm.opencl import OpenCLDevice, opencl_devices
from mlc_llm.runtime.gpu_memory import GPUMemory
from mlc_llm.runtime.library import _load_runtime
from mlc_llm.runtime.opencl import build, load_opencl_runtime

HERE = Path(__file__).parent
_OPENCL = 4  # DLPack's number
_NAME, _TOTAL_MEMORY, _AVAILABLE_MEMORY, _EXISTS = 5, 14, 15, 0
ADD = """
__kernel void add(__global float* x, float f, int i, long l, uint u, char c) {
  size_t at = get_global_id(0);
  if (at < 10) x[at] += f + i + (float)l + u + c;
}
"""
ADD_TYPES = ("handle", "float32", "int32", "int64", "uint32", "int8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A directory where the runtime was built, where there is a device for it."""
    try:
        opencl_devices(allow_cpu=True)
    except DeviceError as error:
        pytest.skip(f"no OpenCL: {error}")
    path: Path = tmp_path_factory.mktemp("opencl")
    _load_runtime()
    load_opencl_runtime(path, lambda _: None, allow_cpu=True)
    return path


@pytest.fixture
def memory(cache) -> GPUMemory:
    return GPUMemory(Device("opencl"))


def function(name: str) -> Any:
    return _load_runtime().get_global_func(name)


def load_kernels(code: bytes) -> Any:
    """Return a module of `library_code`; its kernels run on opencl:0."""
    function("__tvm_set_device")(_OPENCL, 0)
    return function("ffi.Module.load_from_bytes.opencl")(code)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "int8"])
@pytest.mark.parametrize("shape", [(1,), (13,), (3, 5, 7), (0, 4), (1000, 1001)])
def test_arrays_come_back(memory, dtype, shape) -> None:
    array = (np.arange(np.prod(shape)) % 100).reshape(shape).astype(dtype)
    np.testing.assert_array_equal(memory.array(memory.put(array)), array)


def test_copies_within_storages(memory) -> None:
    """Tensors that begin inside of a buffer are copied to, from and among each other."""
    view, copy = function("runtime.TVMTensorCreateView"), function("runtime.TVMTensorCopyFromTo")
    whole = memory.put(np.arange(100, dtype=np.int32))
    ffi = _load_runtime()

    def part(start: int, count: int) -> Any:
        return view(whole, ffi.Shape((count,)), ffi.dtype("int32"), 4 * start)

    copy(part(3, 7), part(50, 7))
    host = np.full(5, -1, np.int32)
    address = ctypes.c_void_p(host.ctypes.data)
    function("runtime.TVMTensorCopyFromBytes")(part(90, 5), address, host.nbytes)
    expected = np.arange(100)
    expected[50:57], expected[90:95] = np.arange(3, 10), -1
    np.testing.assert_array_equal(memory.array(whole), expected)
    np.testing.assert_array_equal(memory.array(part(51, 3)), [4, 5, 6])


def test_freed_memory_counts_as_free(memory) -> None:
    def available() -> int:
        return int(function("runtime.GetDeviceAttr")(_OPENCL, 0, _AVAILABLE_MEMORY))

    before = available()
    tensor = memory.empty((1 << 20,), "float32")
    assert available() == before - (4 << 20)
    del tensor
    assert available() == before


def test_attributes(cache) -> None:
    ask, device = function("runtime.GetDeviceAttr"), opencl_devices(allow_cpu=True)[0]
    assert " ".join(ask(_OPENCL, 0, _NAME).split()) == device.name
    assert ask(_OPENCL, 0, _TOTAL_MEMORY) == device.memory_bytes
    assert ask(_OPENCL, 0, _EXISTS) == 1
    assert ask(_OPENCL, 99, _EXISTS) == 0


def test_kernels_take_numbers_of_many_types(memory) -> None:
    kernel = load_kernels(library_code(ADD, {"add": ADD_TYPES})).add
    x = memory.put(np.zeros(12, np.float32))
    pointer = ctypes.c_void_p(x.data_ptr())
    kernel(pointer, 0.5, -3, 1 << 20, (1 << 32) - 1, -100, 3, 4)
    total = np.float32(0.5 - 3 + (1 << 20) + 2.0**32 - 100)
    np.testing.assert_allclose(memory.array(x), [total] * 10 + [0, 0])
    kernel(pointer, 1.0, 1, 1, 1, 1, 0, 4)  # of an empty tensor
    assert memory.array(x)[0] == total


def test_threads_do_not_mix_their_arguments(memory) -> None:
    kernel = load_kernels(library_code(ADD, {"add": ADD_TYPES})).add
    tensors = [memory.put(np.zeros(10, np.float32)) for _ in range(4)]

    def work(number: int) -> None:
        function("__tvm_set_device")(_OPENCL, 0)
        pointer = ctypes.c_void_p(tensors[number].data_ptr())
        for _ in range(100):
            kernel(pointer, float(number), 0, 0, 0, 0, 2, 5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    for number, tensor in enumerate(tensors):
        np.testing.assert_array_equal(memory.array(tensor), np.full(10, 100 * number))


@pytest.mark.cpu
def test_compiled_functions_run_without_the_compiler(cache, tmp_path) -> None:
    build_chain(tmp_path)
    command = [sys.executable, str(HERE / "run_chain.py"), str(tmp_path), str(cache)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout)
    assert errors.keys() == {"1", "7", "64"}
    assert max(errors.values()) < 1e-5


def test_code_that_does_not_build(memory) -> None:
    code = library_code(
        "__kernel void wrong(__global float* x) { x[0] = y; }", {"wrong": ["handle"]}
    )
    x = memory.empty((1,), "float32")
    with pytest.raises(DeviceError, match=r"(?s)cannot compile the library's code.*'y'"):
        load_kernels(code).wrong(ctypes.c_void_p(x.data_ptr()), 1, 1)


def test_code_in_float16(memory) -> None:
    """Devices without float16 say what to do; others compute."""
    source = (
        "#pragma OPENCL EXTENSION cl_khr_fp16 : enable\n"
        "__kernel void twice(__global half* x) { x[get_global_id(0)] *= (half)2; }"
    )
    kernel = load_kernels(library_code(source, {"twice": ["handle"]})).twice
    x = memory.put(np.ones(4, np.float16))
    try:
        kernel(ctypes.c_void_p(x.data_ptr()), 1, 4)
    except DeviceError as error:
        assert "does not compute in float16" in str(error)
        assert "q4f32_1" in str(error)
    else:
        np.testing.assert_array_equal(memory.array(x), np.full(4, 2))


def test_group_larger_than_the_device_allows(memory) -> None:
    kernel = load_kernels(library_code(ADD, {"add": ADD_TYPES})).add
    x = memory.put(np.zeros(10, np.float32))
    with pytest.raises(
        DeviceError, match=r"does not run the kernel add .* 1048576 x 1 x 1 threads"
    ):
        kernel(ctypes.c_void_p(x.data_ptr()), 0.0, 0, 0, 0, 0, 1, 1 << 20)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (library_code(ADD, {"add": ADD_TYPES})[:-1], "damaged; compile it again"),
        (library_code(ADD, {"add": ADD_TYPES})[:40], "damaged; compile it again"),
        (library_code(ADD, {"add": ADD_TYPES}, form="spv"), "of the form spv"),
    ],
)
def test_damaged_code(cache, code, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_kernels(code)


def test_more_memory_than_there_is(memory) -> None:
    # One buffer of what is free is more than is allowed at once, or the second is too much.
    count = int(function("runtime.GetDeviceAttr")(_OPENCL, 0, _TOTAL_MEMORY)) // 4
    with pytest.raises(DeviceError, match=r"out of memory: \d+ MiB were asked of opencl:0"):
        _ = [memory.empty((count,), "float32"), memory.empty((count,), "float32")]
    assert memory.array(memory.put(np.ones(3, np.int32))).sum() == 3


def test_device_that_is_not_there(cache) -> None:
    with pytest.raises(DeviceError, match="there is no opencl:99 here"):
        GPUMemory(Device("opencl", 99)).empty((1,), "float32")


def fake_device(name: str, kind: str) -> OpenCLDevice:
    return OpenCLDevice(name, kind, 1 << 30, 0, 0)


def test_gpus_are_numbered_first(cache, monkeypatch) -> None:
    found = [fake_device("pocl", "cpu"), fake_device("A", "accelerator"), fake_device("G", "gpu")]
    monkeypatch.setattr(mlc_llm.opencl, "_all_devices", lambda _: iter(found))
    assert [device.name for device in opencl_devices()] == ["G", "A"]
    assert [device.name for device in opencl_devices(allow_cpu=True)] == ["G", "A", "pocl"]
    del found[1:]
    with pytest.raises(DeviceError, match="finds no GPU, only pocl; install the driver"):
        opencl_devices()
    found.clear()
    with pytest.raises(DeviceError, match="finds no device; install the driver"):
        opencl_devices(allow_cpu=True)


def test_opencl_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(mlc_llm.opencl, "OPENCL_LIBRARY", "libNoOpenCL.so.1")
    with pytest.raises(DeviceError, match=r"\(libNoOpenCL\.so\.1\) is not installed; install"):
        opencl_devices()


def write_compiler(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def no_zig(monkeypatch) -> None:
    find = build.importlib.util.find_spec
    monkeypatch.setattr(
        build.importlib.util, "find_spec", lambda name: None if name == "ziglang" else find(name)
    )


def test_no_compiler(tmp_path, monkeypatch, no_zig) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"apt install g\+\+\), or `pip install ziglang`"):
        build.build_runtime(tmp_path, lambda _: None)


def test_the_next_compiler_is_tried(tmp_path, monkeypatch, no_zig) -> None:
    """A library is kept; what failed leaves nothing behind."""
    programs, cache, said = tmp_path / "bin", tmp_path / "cache", []
    write_compiler(programs, "c++", "echo no headers >&2; exit 1")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(DeviceError, match=r"could not be built by .*bin/c\+\+: no headers"):
        build.build_runtime(cache, said.append)
    assert not list(cache.iterdir())
    script = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'
    write_compiler(programs, "clang++", script)
    path = build.build_runtime(cache, said.append)
    assert path.read_text() == "built\n"
    assert list(cache.iterdir()) == [path]
    assert len(said) == 2
    assert build.build_runtime(cache, said.append) == path
    assert len(said) == 2


def test_windows_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(DeviceError, match="not supported on Windows"):
        build.build_runtime(tmp_path, lambda _: None)


def test_unfit_library_is_named(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mlc_llm.runtime.opencl.build_runtime", lambda *_: tmp_path / "no.so")
    ffi = _load_runtime()
    monkeypatch.setattr(ffi, "get_global_func", lambda *_, **__: None)
    with pytest.raises(DeviceError, match=r"no\.so cannot be loaded .*delete it"):
        load_opencl_runtime(tmp_path, lambda _: None, allow_cpu=True)
