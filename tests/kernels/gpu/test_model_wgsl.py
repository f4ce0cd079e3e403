"""Kernels of whole models, fused and scheduled as `compile` does it, as WGSL against the CPU.

The same kernel without a schedule, compiled by LLVM, says what is right. Kernels whose threads are
bound by hand have no such form: sampling and sorting are in test_wgsl_kernels.py against NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from reference_cases import get_case
from wgsl import Device

from mlc_llm.compiler import gpu
from mlc_llm.compiler.target import describe_any_target
from mlc_llm.models.cache_entries import CacheEntries
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import build_quantized
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

SIZES = {"n": 5, "m": 7, "b": 3, "seq_len": 5, "ntoken": 5, "num_pages": 3}
# Kernels of TVM's cache that no step of these models starts: to look into it, and for other models.
IDLE = {"tir_kv_cache_debug_get_kv", "tir_kv_cache_transpose_append_mla"}
# Every whole number is the number of a row, and of the least of these there is.
MOST_INDEX = 3
TOLERANCE = {"float32": 3e-5, "float16": 6e-3}


def kernels_of(case: str, quantization: str) -> dict[str, Any]:
    """Return the kernels of a model for browsers, fused and not scheduled, by name."""
    huggingface = get_case(case).config()
    family = find_family(huggingface)
    config = family.config_from_huggingface(huggingface)
    model = build_quantized(family, config, get_scheme(quantization))
    with tvm.target.Target(describe_any_target("webgpu", "O2")["target"]):
        mod, _ = model.export_tvm(CacheEntries(model).export_spec())
        name, passes = gpu.gpu_phases({"n": 64, "b": 4})[0]
        assert name == "fuse"
        mod = tvm.transform.Sequential(passes)(mod)
    return {
        str(var.name_hint): with_known_numbers(function)
        for var, function in mod.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc) and str(var.name_hint) not in IDLE
    }


def with_known_numbers(kernel: Any) -> Any:
    """Return a kernel of tensors alone: numbers among the arguments, which are flags, are 1."""
    numbers = [number for number in kernel.params if not tvm.tirx.is_buffer_var(number)]
    known = {number: tvm.tirx.const(1, str(number.ty.dtype)) for number in numbers}
    return kernel.specialize(known) if known else kernel


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


def is_bound_by_hand(kernel: Any) -> bool:
    return "tirx.is_scheduled" in kernel.attrs


@pytest.mark.parametrize(
    ("case", "quantization"),
    [("llama_gqa", "q4f32_1"), ("qwen2_gqa", "q4f16_1"), ("qwen3", "q0f16")],
)
def test_kernels_of_a_model(webgpu: Device, case: str, quantization: str) -> None:
    if "f16" in quantization and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    kernels = {n: k for n, k in kernels_of(case, quantization).items() if not is_bound_by_hand(k)}
    for part in ("linear", "rms_norm", "rotate", "last_row", "take_rows"):
        assert any(part in name for name in kernels), part
    wrong = {}
    for name, kernel in kernels.items():
        tensors = random_tensors(kernel)
        expected, found = run_on_cpu(kernel, tensors), webgpu.run(kernel, **tensors)
        for tensor, value in expected.items():
            wide = value.astype(np.float64)
            tolerance = TOLERANCE.get(str(value.dtype), 0) * max(1.0, np.abs(wide).max())
            error = np.abs(found[tensor].astype(np.float64) - wide).max()
            if not error <= tolerance:
                wrong[name, tensor] = error
    assert not wrong
