"""Kernels of whole models for browsers, as `compile` makes them before it schedules them."""

from __future__ import annotations

from typing import Any

import tvm
from reference_cases import get_case

from mlc_llm.compiler import gpu
from mlc_llm.compiler.target import describe_any_target
from mlc_llm.models.cache_entries import CacheEntries
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import build_quantized
from mlc_llm.quantization.schemes import get_scheme


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
        str(var.name_hint): function
        for var, function in mod.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }


def with_numbers(kernel: Any, **values: float) -> Any:
    """Return a kernel of tensors alone: numbers among the arguments are these, or else 1."""
    numbers = [number for number in kernel.params if not tvm.tirx.is_buffer_var(number)]
    known = {
        number: tvm.tirx.const(values.get(str(number.name), 1), str(number.ty.dtype))
        for number in numbers
    }
    return kernel.specialize(known) if known else kernel
