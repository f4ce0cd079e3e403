"""Linears of few rows on GPUs: what is computed, and how many blocks of threads compute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from test_model_wgsl import run_on_cpu
from wgsl import Launch, launches_of, translate

from mlc_llm.compiler.cuda_code import assemble
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.gpu import linear
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.group import dequantize_group, quantize_group
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

# The multiprocessors of an H100, and the registers of each.
MULTIPROCESSORS, REGISTERS = 132, 65536


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


@pytest.mark.parametrize("quantization", ["q0f16", "q4f16_1", "q4f16_0", "q3f16_1"])
def test_few_rows_keep_a_gpu_busy(quantization: str) -> None:
    kernel = product(4096, quantization)
    for n in (8, 32):
        (launch,) = launches(kernel, n)
        blocks = launch.groups[0] * launch.groups[1]
        assert blocks >= 2 * MULTIPROCESSORS * (-(-n // 8))


@pytest.mark.parametrize(
    ("quantization", "n", "architecture"),
    [("q0f16", 9, "sm_80"), ("q4f16_1", 64, "sm_80"), ("q8f16_1", 7, "sm_75")],
)
def test_tensor_cores(tmp_path: Path, quantization: str, n: int, architecture: str) -> None:
    rng, scheme = np.random.default_rng(n), get_scheme(quantization)
    x, weight = (rng.standard_normal(shape).astype("f2") for shape in ((n, 320), (40, 320)))
    tensors = {"x": x, "out": np.full((n, 40), np.nan, np.float16)}
    if scheme.kind == "none":
        bias = rng.standard_normal(40).astype("f2")
        kernel = linear.matmul(None, 40, 320, "float16", "float16", True)
        tensors |= {"weight": weight, "bias": bias}
        expected = x.astype(np.float64) @ weight.T + bias
    else:
        words, scales = quantize_group(weight.astype("f4"), scheme, transpose=False)
        form = group_format(scheme, is_linear=True)
        kernel = linear.group_matmul(None, 40, 320, form, "float16", False)
        tensors |= {"words": words, "scales": scales}
        stored = dequantize_group(words, scales, scheme, 320, transposed=False)
        expected = x.astype(np.float64) @ stored.T
    found = cuda_on_cpu.run(kernel, architecture, tmp_path, **tensors)["out"]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("bits", "group_size", "zero"), [(6, 16, 32), (5, 32, None)])
def test_tensor_cores_take_codes_of_two_words(
    tmp_path: Path, bits: int, group_size: int, zero: int | None
) -> None:
    rng, groups = np.random.default_rng(bits), 256 // group_size
    form = GroupFormat(bits, group_size, "float16", False, zero, has_minimum=zero is None)
    shapes = (40, groups * form.words_per_group), (40, groups * form.scales_per_group)
    tensors = {
        "x": rng.standard_normal((5, 256)).astype("f2"),
        "words": rng.integers(0, 1 << 32, shapes[0], np.uint32),
        "scales": rng.standard_normal(shapes[1]).astype("f2"),
        "out": np.full((5, 40), np.nan, np.float16),
    }
    kernel = linear.group_matmul(None, 40, 256, form, "float16", False)
    expected = run_on_cpu(kernel, tensors)["out"].astype(np.float64)
    found = cuda_on_cpu.run(kernel, "sm_80", tmp_path, **tensors)["out"]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("quantization", ["q0f16", "q4f16_1"])
def test_tensor_cores_are_kept_busy(quantization: str) -> None:
    source, host = cuda_on_cpu.translate(product(4096, quantization), "sm_90")
    taken = assemble(source, "sm_90").resources()
    for n in (2, 8, 9, 16, 17, 32, 33, 64):
        ((name, groups, _),) = launches_of(host, {"n": n})
        assert groups[0] * groups[1] == 256  # 16 outputs each, all at the same time
        assert f"launch_bounds__(256) {name}(" in source and not taken[name].spilled_bytes
        # Two blocks of 256 threads at a time, for up to 32 rows.
        assert taken[name].registers * 256 * (2 if n <= 32 else 1) <= REGISTERS
