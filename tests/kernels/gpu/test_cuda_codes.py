"""Kernels that read codes as NVIDIA's machine code: AWQ's, 8-bit floats, int8 keys and values."""

from __future__ import annotations

from typing import Any

import pytest
from test_cuda_machine_code import check_resources, translate

from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu import attention, codes, int8_pages
from mlc_llm.kernels.gpu.attention_scores import BlockLimits

pytestmark = pytest.mark.cpu

SHAPE = AttentionShape(32, 8, 128, 16, "int8", 128**-0.5, -1)
# As `nn.gpu_attention` has them for CUDA.
LIMITS = BlockLimits(shared_bytes=49152, load_bytes=16, max_parts=32)
KERNELS = {
    "awq": lambda: codes.awq_matmul(None, 256, 256, "float16", True),
    "float8": lambda: codes.float8_matmul(
        None, 256, 256, "float8_e4m3fn", "block", "bfloat16", False
    ),
    "attention": lambda: attention.paged_attention(SHAPE, "float16", None, LIMITS),
    "pages": lambda: int8_pages.rope_and_write(SHAPE, 128, False, "float16"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_fit(name: str) -> None:
    kernel: Any = KERNELS[name]()
    source, _ = translate(kernel, "sm_90")
    check_resources(source, "sm_90")
