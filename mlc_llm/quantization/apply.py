"""Quantization of a model from outside: which layers change, and what each parameter becomes.

Models do not know schemes. Visits the module tree, swaps layers, and keeps the plan by which a
converter turns checkpoint tensors into the parameters of the quantized module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.artifact import TensorSpec, numpy_dtype
from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.plan import ParamPlan, Quantize, concatenate
from mlc_llm.nn.image_ops import Unquantized
from mlc_llm.nn.linear import (
    Bf16Embedding,
    Bf16Linear,
    Embedding,
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    Linear,
)
from mlc_llm.nn.moe import Experts, GroupQuantizedExperts
from mlc_llm.nn.packed_linear import AwqLinear, Float8Linear
from mlc_llm.quantization.formats import FALLBACK_FORMAT, join_formats, parse_format
from mlc_llm.quantization.group import packed_specs, quantize_group
from mlc_llm.quantization.schemes import Scheme
from mlc_llm.quantization.storage import (
    Storage,
    awq_storage,
    float8_storage,
    native_storage,
)

_FINAL_LAYERS = ("head", "lm_head", "lm_head.linear", "embed_out")
# Layers of these names with up to so many outputs choose experts and stay as they are.
_GATES = ("gate", "router")
_MAX_GATE_FEATURES = 256


def build_quantized(
    family: Family,
    config: DecoderConfig,
    scheme: Scheme,
    int8_isa: str | None = None,
    bf16_isa: str | None = None,
    formats: Mapping[str, str] = MappingProxyType({}),
) -> CausalLM:
    """Build a family's module with its layers quantized by `scheme`.

    formats: for schemes in which layers differ, the format of each, see `native_formats`.

    int8_isa, bf16_isa: instruction sets for kernels that round activations to int8, for quantized
    weights, and to bfloat16, for bfloat16 weights; None keeps activations float32.
    """
    model = family.build(config, scheme.dtype)
    for path, layer in list(named_modules(model, "")):
        replacement = _quantized_layer(path, layer, scheme, int8_isa, formats.get(path))
        if replacement is None and scheme.dtype == "bfloat16" and bf16_isa is not None:
            replacement = _bf16_layer(layer, bf16_isa)
        if replacement is not None:
            _replace(model, path, replacement)
    return model


def plan_parameters(
    family: Family,
    config: DecoderConfig,
    scheme: Scheme,
    formats: Mapping[str, str] = MappingProxyType({}),
) -> list[ParamPlan]:
    """Return, in file order, every parameter of the model and how `scheme` stores it.

    formats: as for `build_quantized`.
    """
    model = family.build(config, scheme.dtype)
    modules = dict(named_modules(model, ""))
    plans = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = modules.get(path)
        shape = tuple(int(extent) for extent in parameter.shape)
        storage = _special_storage(path, layer, shape, scheme, formats.get(path))
        if leaf == "weight" and storage is not None:
            plans.append(
                ParamPlan(
                    name,
                    shape,
                    family.rule_for(name, config),
                    storage.outputs,
                    storage.store,
                    storage.store_encoded,
                )
            )
            continue
        outputs: tuple[TensorSpec, ...]
        if leaf == "weight" and layer is not None and _is_quantized(path, layer, scheme):
            transpose = isinstance(layer, Linear) and scheme.layout == "KN"
            outputs = packed_specs(path, shape, scheme, transpose=transpose)
            store = _group_store(scheme, transpose)
        else:
            outputs = (TensorSpec(name, shape, parameter.dtype),)
            store = _cast_store(parameter.dtype)
        plans.append(ParamPlan(name, shape, family.rule_for(name, config), outputs, store))
    return plans


def native_formats(
    family: Family,
    config: DecoderConfig,
    scheme: Scheme,
    encoding_of: Callable[[str], str | None],
) -> dict[str, str]:
    """Return module path -> format of the layers that a checkpoint holds quantized.

    encoding_of: checkpoint tensor -> the name of the format its codes fit, None where it has none.
    Layers fused of several tensors get a format that holds the codes of all.
    """
    if scheme.kind != "gguf":
        return {}
    model = family.build(config, scheme.dtype)
    formats = {}
    for path, layer in named_modules(model, ""):
        if not isinstance(layer, (Linear, Embedding)) or _is_gate(path, layer):
            continue
        rule = family.rule_for(f"{path}.weight", config)
        found = [encoding_of(name) for name in rule.sources]
        names = [name for name in found if name is not None]
        if names and len(names) == len(found) and rule.combine is concatenate:
            formats[path] = join_formats(names)
        elif names:
            formats[path] = FALLBACK_FORMAT
    return formats


def _special_storage(
    path: str,
    layer: nn.Module | None,
    shape: tuple[int, ...],
    scheme: Scheme,
    format_name: str | None,
) -> Storage | None:
    """Return how a layer's weight is stored, where that is not group quantization or as it is."""
    if isinstance(layer, Experts) and scheme.kind not in ("none", "group"):
        raise UnsupportedModel(
            f"{scheme.name} cannot hold the experts of this model ({path}); choose q4f16_1"
        )
    if not isinstance(layer, (Linear, Embedding)) or _is_gate(path, layer):
        return None
    rows, columns = shape[0], shape[-1]
    if format_name is not None:
        return native_storage(path, rows, columns, format_name)
    if not isinstance(layer, Linear) or path in _FINAL_LAYERS:
        return None
    if scheme.kind == "awq":
        return awq_storage(path, rows, columns, scheme)
    return float8_storage(path, rows, columns, scheme) if scheme.kind == "float8" else None


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


def _is_gate(path: str, layer: nn.Module) -> bool:
    is_small = isinstance(layer, Linear) and layer.out_features <= _MAX_GATE_FEATURES
    return is_small and path.endswith(_GATES)


def _is_quantized(path: str, layer: nn.Module, scheme: Scheme) -> bool:
    if scheme.kind != "group" or _is_gate(path, layer):
        return False
    if isinstance(layer, Experts):
        return True
    if isinstance(layer, Linear):
        return scheme.quantize_final_fc or path not in _FINAL_LAYERS
    return isinstance(layer, Embedding) and scheme.quantize_embedding


def _quantized_layer(
    path: str, layer: nn.Module, scheme: Scheme, int8_isa: str | None, format_name: str | None
) -> nn.Module | None:
    if isinstance(layer, Linear) and path not in _FINAL_LAYERS and not _is_gate(path, layer):
        if scheme.kind == "awq":
            return AwqLinear(layer, int8_isa)
        if scheme.kind == "float8":
            scales, is_static = scheme.float8_scales, scheme.has_activation_scale
            return Float8Linear(layer, scheme.float8_dtype, scales, is_static)
    if format_name is not None:
        form = parse_format(format_name)
        if isinstance(layer, Linear):
            return GroupQuantizedLinear(layer, form, int8_isa)
        assert isinstance(layer, Embedding)
        return GroupQuantizedEmbedding(layer, form, int8_isa)
    if not _is_quantized(path, layer, scheme):
        return None
    if isinstance(layer, Linear):
        return GroupQuantizedLinear(layer, group_format(scheme, is_linear=True), int8_isa)
    if isinstance(layer, Experts):
        return GroupQuantizedExperts(layer, group_format(scheme, is_linear=False), int8_isa)
    return GroupQuantizedEmbedding(layer, group_format(scheme, is_linear=False), int8_isa)


def _bf16_layer(layer: nn.Module, isa: str) -> nn.Module | None:
    if isinstance(layer, Linear):
        return Bf16Linear(layer, isa)
    return Bf16Embedding(layer, isa) if isinstance(layer, Embedding) else None


def named_modules(module: nn.Module, prefix: str) -> Any:
    """Yield the path and the module of everything in a module; paths begin with `prefix`."""
    for name, child in vars(module).items():
        path = f"{prefix}{name}"
        if isinstance(child, Unquantized):
            continue
        if isinstance(child, nn.ModuleList):
            for index, item in enumerate(child):
                yield f"{path}.{index}", item
                yield from named_modules(item, f"{path}.{index}.")
        elif isinstance(child, nn.Module):
            yield path, child
            yield from named_modules(child, f"{path}.")


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, leaf = path.split(".")
    owner: Any = model
    for name in parents:
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
    setattr(owner, leaf, layer)
