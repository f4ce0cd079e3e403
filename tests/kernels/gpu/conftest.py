"""A WebGPU device for kernels, real or computed on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from wgsl import Device


@pytest.fixture(scope="session")
def webgpu() -> Iterator[Device]:
    if importlib.util.find_spec("wgpu") is None:
        pytest.skip("the package wgpu is not installed; `pip install wgpu` runs WGSL kernels")
    try:
        device = Device()
    except RuntimeError as error:
        pytest.skip(f"there is no WebGPU adapter ({error}); `apt-get install mesa-vulkan-drivers`")
    yield device
