"""Kernels of whole models, fused and scheduled as `compile` does it, as WGSL against the CPU.

The same kernel without a schedule, compiled by LLVM, says what is right. Kernels whose threads are
bound by hand have no such form: test_wgsl_kernels.py has those of sampling and sorting, and
test_wgsl_cache.py those of TVM's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from model_kernels import kernels_of, with_numbers
from wgsl import Device, shapes_of, translate

pytestmark = pytest.mark.cpu

SIZES = {"n": 5, "m": 7, "b": 3, "seq_len": 5, "ntoken": 5, "num_pages": 3}
# Kernels of TVM's cache that no step of these models starts: to look into it, and for other models.
IDLE = {"tir_kv_cache_debug_get_kv", "tir_kv_cache_transpose_append_mla"}
# Every whole number is the number of a row, and of the least of these there is.
MOST_INDEX = 3
TOLERANCE = {"float32": 3e-5, "float16": 6e-3}


def random_tensors(kernel: Any) -> dict[str, np.ndarray]:
    """Return what a kernel can be called with, by the names of its arguments."""
    rng = np.random.default_rng(0)
    tensors = {}
    for buffer in kernel.params:
        shape = [SIZES[e.name] if isinstance(e, tvm.ir.Var) else int(e) for e in buffer.shape]
        if buffer.dtype == "int32":
            tensor = rng.integers(0, MOST_INDEX, shape)
        elif buffer.dtype == "uint32":
            tensor = rng.integers(0, 1 << 32, shape)
        else:
            tensor = rng.standard_normal(shape)
        tensors[str(buffer.name)] = tensor.astype(str(buffer.dtype))
    return tensors


def run_on_cpu(kernel: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what tensors hold after the kernel, which has no schedule."""
    mod = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    run = tvm.compile(mod, target="llvm")["kernel"]
    given = {name: tvm.runtime.tensor(tensor) for name, tensor in tensors.items()}
    run(*given.values())
    return {name: tensor.numpy() for name, tensor in given.items()}


@pytest.mark.parametrize(
    ("case", "quantization"),
    [("llama_gqa", "q4f32_1"), ("qwen2_gqa", "q4f16_1"), ("qwen3", "q0f16")],
)
def test_kernels_of_a_model(webgpu: Device, case: str, quantization: str) -> None:
    if "f16" in quantization and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    kernels = {
        name: with_numbers(kernel)
        for name, kernel in kernels_of(case, quantization).items()
        if name not in IDLE and "tirx.is_scheduled" not in kernel.attrs
    }
    for part in ("linear", "rms_norm", "rotate", "last_row", "take_rows"):
        assert any(part in name for name in kernels), part
    wrong = {}
    for name, kernel in kernels.items():
        tensors = random_tensors(kernel)
        shaders = translate(kernel, shapes_of(tensors), has_few_rows=False)
        expected, found = run_on_cpu(kernel, tensors), webgpu.start(shaders, tensors)
        for tensor, value in expected.items():
            wide = value.astype(np.float64)
            tolerance = TOLERANCE.get(str(value.dtype), 0) * max(1.0, np.abs(wide).max())
            error = np.abs(found[tensor].astype(np.float64) - wide).max()
            if not error <= tolerance:
                wrong[name, tensor] = error
    assert not wrong
