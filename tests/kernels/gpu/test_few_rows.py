"""Linears of few rows on GPUs: what is computed, and how many blocks of threads compute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wgsl import Launch, translate

from mlc_llm.kernels.gpu import linear
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

# The multiprocessors of an H100.
MULTIPROCESSORS = 132


@pytest.mark.parametrize("n", [2, 4, 5, 8, 9, 31, 32, 33, 64])
def test_numbers_of_rows(webgpu: Any, n: int) -> None:
    # Outputs that fill no block of threads, and pieces of a row that fill no turn of them.
    rng = np.random.default_rng(n)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((n, 264), (37, 264)))
    kernel = linear.matmul(None, 37, 264, "float32", "float32", False)
    found = webgpu.run(kernel, x=x, weight=weight, out=np.full((n, 37), np.nan, np.float32))
    np.testing.assert_allclose(found["out"], x.astype(np.float64) @ weight.T, atol=1e-4, rtol=0)


def product(size: int, quantization: str) -> Any:
    """Return the kernel of a linear layer of `size` inputs and outputs."""
    scheme = get_scheme(quantization)
    if scheme.kind == "none":
        return linear.matmul(None, size, size, scheme.dtype, scheme.dtype, True)
    form = group_format(scheme, is_linear=True)
    return linear.group_matmul(None, size, size, form, scheme.dtype, False)


def launches(kernel: Any, n: int) -> list[Launch]:
    """Return what is started for n rows."""
    shapes = {
        str(tensor.name): tuple(n if index == 0 else int(e) for index, e in enumerate(tensor.shape))
        if str(tensor.name) in ("x", "out")
        else tuple(int(extent) for extent in tensor.shape)
        for tensor in kernel.params
    }
    return translate(kernel, shapes)


@pytest.mark.parametrize("quantization", ["q0f16", "q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1"])
def test_few_rows_keep_a_gpu_busy(quantization: str) -> None:
    kernel = product(4096, quantization)
    for n in (2, 8, 32):
        (launch,) = launches(kernel, n)
        blocks = launch.groups[0] * launch.groups[1]
        assert blocks >= 2 * MULTIPROCESSORS * (-(-n // 8))
