"""Quantization of a model from outside: which layers change, and what each parameter becomes.

Models do not know schemes. Visits the module tree, swaps layers, and keeps the plan by which a
converter turns checkpoint tensors into the parameters of the quantized module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.artifact import TensorSpec, numpy_dtype
from mlc_llm.kernels.cpu.group_linear import GroupFormat
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.plan import ParamPlan, Quantize
from mlc_llm.nn.linear import (
    Bf16Embedding,
    Bf16Linear,
    Embedding,
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    Linear,
)
from mlc_llm.quantization.group import packed_specs, quantize_group
from mlc_llm.quantization.schemes import Scheme

_FINAL_LAYERS = ("head", "lm_head", "lm_head.linear", "embed_out")


def build_quantized(
    family: Family,
    config: DecoderConfig,
    scheme: Scheme,
    int8_isa: str | None = None,
    bf16_isa: str | None = None,
) -> CausalLM:
    """Build a family's module with its layers quantized by `scheme`.

    int8_isa, bf16_isa: instruction sets for kernels that round activations to int8, for quantized
    weights, and to bfloat16, for bfloat16 weights; None keeps activations float32.
    """
    model = family.build(config, scheme.dtype)
    for path, layer in list(_named_modules(model, "")):
        replacement = _quantized_layer(path, layer, scheme, int8_isa)
        if replacement is None and scheme.dtype == "bfloat16" and bf16_isa is not None:
            replacement = _bf16_layer(layer, bf16_isa)
        if replacement is not None:
            _replace(model, path, replacement)
    return model


def plan_parameters(family: Family, config: DecoderConfig, scheme: Scheme) -> list[ParamPlan]:
    """Return, in file order, every parameter of the model and how `scheme` stores it."""
    model = family.build(config, scheme.dtype)
    modules = dict(_named_modules(model, ""))
    plans = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = modules.get(path)
        shape = tuple(int(extent) for extent in parameter.shape)
        outputs: tuple[TensorSpec, ...]
        if leaf == "weight" and layer is not None and _is_quantized(path, layer, scheme):
            transpose = isinstance(layer, Linear) and scheme.layout == "KN"
            outputs = packed_specs(path, shape[0], shape[1], scheme, transpose=transpose)
            store = _group_store(scheme, transpose)
        else:
            outputs = (TensorSpec(name, shape, parameter.dtype),)
            store = _cast_store(parameter.dtype)
        plans.append(ParamPlan(name, shape, family.rule_for(name, config), outputs, store))
    return plans


def group_format(scheme: Scheme, is_linear: bool) -> GroupFormat:
    """Return the kernel's view of a group scheme; only linears may be transposed."""
    return GroupFormat(
        scheme.bits, scheme.group_size, scheme.dtype, is_linear and scheme.layout == "KN"
    )


def _group_store(scheme: Scheme, transpose: bool) -> Quantize:
    def store(weight: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        return quantize_group(weight, scheme, transpose=transpose)

    return store


def _cast_store(dtype: str) -> Quantize:
    def store(weight: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        with np.errstate(over="ignore"):
            return (np.ascontiguousarray(weight).astype(numpy_dtype(dtype), copy=False),)

    return store


def _is_quantized(path: str, layer: nn.Module, scheme: Scheme) -> bool:
    if scheme.kind != "group":
        return False
    if isinstance(layer, Linear):
        return scheme.quantize_final_fc or path not in _FINAL_LAYERS
    return isinstance(layer, Embedding) and scheme.quantize_embedding


def _quantized_layer(
    path: str, layer: nn.Module, scheme: Scheme, int8_isa: str | None
) -> nn.Module | None:
    if not _is_quantized(path, layer, scheme):
        return None
    if isinstance(layer, Linear):
        return GroupQuantizedLinear(layer, group_format(scheme, is_linear=True), int8_isa)
    return GroupQuantizedEmbedding(layer, group_format(scheme, is_linear=False), int8_isa)


def _bf16_layer(layer: nn.Module, isa: str) -> nn.Module | None:
    if isinstance(layer, Linear):
        return Bf16Linear(layer, isa)
    return Bf16Embedding(layer, isa) if isinstance(layer, Embedding) else None


def _named_modules(module: nn.Module, prefix: str) -> Any:
    for name, child in vars(module).items():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            for index, item in enumerate(child):
                yield f"{path}.{index}", item
                yield from _named_modules(item, f"{path}.{index}.")
        elif isinstance(child, nn.Module):
            yield path, child
            yield from _named_modules(child, f"{path}.")


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, leaf = path.split(".")
    owner: Any = model
    for name in parents:
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
    setattr(owner, leaf, layer)
