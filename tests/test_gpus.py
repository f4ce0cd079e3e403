"""GPUs that are found, or are not, and what is said of those: with drivers that are made up."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from mlc_llm import gpus
from mlc_llm.device import CPU, Device, detect_device, detect_devices, parse_device
from mlc_llm.errors import DeviceError
from mlc_llm.gpus import GPU, cuda_architecture, find_gpu, gpus_of
from mlc_llm.opencl import OPENCL_LIBRARY


class FakeDriver:
    """Answers as NVIDIA's driver does for machines with so many H200."""

    def __init__(self, count: int, code: int = 0) -> None:
        self.count, self.code = count, code

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: ctypes._Pointer[ctypes.c_int]) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: ctypes._Pointer[ctypes.c_int], index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, number, attribute, device) -> int:
        number._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceGetName(self, name, size, device) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceTotalMem_v2(self, memory, device) -> int:
        memory._obj.value = 141 << 30
        return 0


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    def clear() -> None:
        gpus.gpus_of.cache_clear()
        gpus._ask_cuda.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def driver(monkeypatch):
    def install(fake: FakeDriver | None) -> None:
        def load(name, *mode):
            if fake is None or name == OPENCL_LIBRARY:
                raise OSError(f"{name}: no such file")
            return fake

        monkeypatch.setattr(gpus.ctypes, "CDLL", load)

    return install


def test_cuda_is_found(driver) -> None:
    driver(FakeDriver(2))
    first, second = gpus_of("cuda")
    assert first == GPU("cuda", 0, "NVIDIA H200", 141 << 30, "sm_90")
    assert second.id == 1
    assert cuda_architecture(1) == "sm_90"
    assert cuda_architecture(2) is None
    assert parse_device("cuda:1") == Device("cuda", 1)
    assert parse_device("auto") == detect_device() == Device("cuda", 0)
    assert parse_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"no cuda:2 here; there is cuda:0 \(NVIDIA H200\), cuda"):
        find_gpu("cuda", 2)
    report = detect_devices()[0]
    assert (report.name, report.found) == ("cuda", True)
    assert "NVIDIA H200 (cuda:0)" in report.detail


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (None, "driver .* is not installed"),
        (FakeDriver(0), "finds no GPU; is it hidden by CUDA_VISIBLE_DEVICES"),
        (FakeDriver(1, code=100), "answers cuInit with error 100"),
    ],
)
def test_cuda_is_missed(driver, fake, words) -> None:
    driver(fake)
    with pytest.raises(DeviceError, match=words):
        gpus_of("cuda")
    with pytest.raises(DeviceError, match=rf"device 'cuda:0': .*{words}.*; or use --device cpu"):
        parse_device("cuda:0")
    assert cuda_architecture(0) is None
    assert detect_device() == CPU


def test_cuda_without_its_runtime(driver, monkeypatch) -> None:
    driver(FakeDriver(1))
    fake = gpus.ctypes.CDLL

    def load(name, *mode):
        if "cudart" in name:
            raise OSError(name)
        return fake(name, *mode)

    monkeypatch.setattr(gpus.ctypes, "CDLL", load)
    with pytest.raises(DeviceError, match=r"pip install mlc_llm\[cuda\]"):
        gpus_of("cuda")
    assert cuda_architecture(0) == "sm_90"  # enough to compile for it


@pytest.mark.parametrize("kind", ["rocm", "vulkan"])
def test_kinds_without_a_runtime(kind) -> None:
    with pytest.raises(DeviceError, match=f"no runtime for .*USE_{kind.upper()}=ON"):
        find_gpu(kind, 0)


def test_metal_elsewhere(monkeypatch) -> None:
    monkeypatch.setattr(gpus.sys, "platform", "linux")
    with pytest.raises(DeviceError, match="Apple's systems only"):
        find_gpu("metal", 0)


def test_opencl_is_taken_by_name_only(driver, monkeypatch) -> None:
    driver(None)
    asked = []

    def find() -> tuple[GPU, ...]:
        asked.append("opencl")
        return (GPU("opencl", 0, "Arc", 1 << 30),)

    monkeypatch.setattr(gpus, "_opencl_gpus", find)
    assert detect_device() == CPU
    assert not asked  # its drivers may take long to load
    assert parse_device("opencl") == Device("opencl", 0)
    assert asked
