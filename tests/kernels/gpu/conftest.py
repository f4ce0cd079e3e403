"""A WebGPU device for kernels, real or computed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from wgsl import Device


@pytest.fixture(scope="session")
def webgpu() -> Iterator[Device]:
    try:
        device = Device()
    except RuntimeError as error:
        pytest.skip(f"there is no WebGPU adapter ({error}); `apt-get install mesa-vulkan-drivers`")
    yield device
