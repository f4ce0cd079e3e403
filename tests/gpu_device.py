"""The GPU that tests run on: OpenCL on the CPU (Debian's pocl-opencl-icd) is one."""

from __future__ import annotations

import os

import pytest

from mlc_llm.errors import DeviceError
from mlc_llm.gpus import GPU_KINDS, gpus_of


def find_gpu() -> str:
    """Return what MLC_LLM_TEST_DEVICE names, or the first that is found; skip where none is."""
    if chosen := os.environ.get("MLC_LLM_TEST_DEVICE"):
        return chosen
    misses = []
    for kind in GPU_KINDS:
        try:
            return f"{kind}:{gpus_of(kind)[0].id}"
        except DeviceError as error:
            misses.append(f"{kind}: {error}")
    pytest.skip("; ".join(misses))
