"""How the weight of one layer is stored by schemes that are not MLC LLM's group quantization.

Knows arrays, names and schemes. Does not know modules, files or TVM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import TensorSpec, numpy_dtype
from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.models.plan import Quantize
from mlc_llm.quantization.encoded import AwqArrays, Float8Blocks, GroupCodes, all_of
from mlc_llm.quantization.formats import format_specs, pack_codes, parse_format, quantize_codes
from mlc_llm.quantization.schemes import Scheme

Arrays = tuple[NDArray[Any], ...]
# Encoded parts of a parameter, in the order of its rule -> arrays, or None where they do not fit.
StoreEncoded = Callable[[Sequence[Any]], Arrays | None]

_BLOCK = 128
_E4M3_MAX = 448.0
_MIN_SCALE = np.float32(1 / (_E4M3_MAX * 512))


@dataclass(frozen=True)
class Storage:
    """What a weight becomes: from float values, and from what a checkpoint already quantized."""

    outputs: tuple[TensorSpec, ...]
    store: Quantize
    store_encoded: StoreEncoded | None = None


def awq_storage(path: str, out_features: int, in_features: int, scheme: Scheme) -> Storage:
    """Store integers of AutoAWQ as they are. Raises UnsupportedModel for sizes it has not."""
    group_size = scheme.group_size
    if in_features % group_size or out_features % 8:
        raise UnsupportedModel(
            f"{path} is {out_features} x {in_features}; {scheme.name} needs a multiple of "
            f"{group_size} inputs and of 8 outputs; choose q4f16_1"
        )
    groups, words = in_features // group_size, out_features // 8
    outputs = (
        TensorSpec(f"{path}.qweight", (in_features, words), "uint32"),
        TensorSpec(f"{path}.qzeros", (groups, words), "uint32"),
        TensorSpec(f"{path}.scales", (groups, out_features), "float16"),
    )

    def refuse(_: NDArray[Any]) -> Arrays:
        raise UnsupportedModel(
            f"{scheme.name} keeps the integers of a checkpoint that AutoAWQ calibrated, and this "
            "checkpoint has none; name an AWQ repository, or choose q4f16_1"
        )

    def store_encoded(parts: Sequence[Any]) -> Arrays | None:
        if not all_of(AwqArrays, parts):
            return None
        for part in parts:
            found = len(part.qweight) // max(1, len(part.scales))
            if found != group_size:
                raise UnsupportedModel(
                    f"the checkpoint has groups of {found}, {scheme.name} has groups of "
                    f"{group_size}; choose q4f16_1, to which it can be converted"
                )
        return (
            np.concatenate([_as_uint32(part.qweight) for part in parts], axis=1),
            np.concatenate([_as_uint32(part.qzeros) for part in parts], axis=1),
            np.concatenate([part.scales.astype(np.float16) for part in parts], axis=1),
        )

    return Storage(outputs, refuse, store_encoded)


def _as_uint32(words: NDArray[Any]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(words).view(np.uint32)


def float8_storage(path: str, out_features: int, in_features: int, scheme: Scheme) -> Storage:
    """Store 8-bit floats, with what scales the scheme has."""
    dtype, shape = scheme.float8_dtype, (out_features, in_features)
    outputs: tuple[TensorSpec, ...]
    if scheme.float8_scales == "none":
        return Storage(
            (TensorSpec(f"{path}.q_weight", shape, dtype),),
            lambda weight: (_round(_checked(weight), dtype),),
        )
    if scheme.float8_scales == "tensor":
        outputs = (
            TensorSpec(f"{path}.q_weight", shape, dtype),
            TensorSpec(f"{path}.q_calibration_scale", (1,), "float32"),
            TensorSpec(f"{path}.q_scale", (1,), "float32"),
        )
        return Storage(outputs, _store_per_tensor)
    extents = (-(-out_features // _BLOCK), -(-in_features // _BLOCK))
    outputs = (
        TensorSpec(f"{path}.weight", shape, dtype),
        TensorSpec(f"{path}.weight_scale_inv", extents, "float32"),
    )
    if not scheme.has_activation_scale:
        return Storage(outputs, _store_blocks, lambda parts: _join_blocks(path, parts))
    outputs = (*outputs, TensorSpec(f"{path}.activation_scale", (1,), "float32"))

    def store(weight: NDArray[Any]) -> Arrays:
        # Nobody measured activations: 1 leaves them as they are.
        return (*_store_blocks(weight), np.ones(1, np.float32))

    def store_encoded(parts: Sequence[Any]) -> Arrays | None:
        joined = _join_blocks(path, parts)
        if joined is None:
            return None
        scales = [part.activation_scale for part in parts if part.activation_scale is not None]
        return (*joined, np.full(1, max(scales, default=1.0), np.float32))

    return Storage(outputs, store, store_encoded)


def _store_per_tensor(weight: NDArray[Any]) -> Arrays:
    values = _checked(weight)
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    scale = max(np.float32(largest) / np.float32(_E4M3_MAX), _MIN_SCALE)
    # Nobody measured activations: 1 leaves them as they are.
    return _round(values / scale, "float8_e4m3fn"), np.ones(1, np.float32), np.full(1, scale)


def _store_blocks(weight: NDArray[Any]) -> Arrays:
    values = _checked(weight)
    rows, columns = values.shape
    padded = np.zeros((-(-rows // _BLOCK) * _BLOCK, -(-columns // _BLOCK) * _BLOCK), np.float32)
    padded[:rows, :columns] = values
    blocks = padded.reshape(len(padded) // _BLOCK, _BLOCK, -1, _BLOCK)
    scale = np.abs(blocks).max(axis=(1, 3)) / np.float32(_E4M3_MAX)
    scale = np.maximum(scale, _MIN_SCALE)
    blocks /= scale[:, None, :, None]
    return np.ascontiguousarray(_round(padded, "float8_e4m3fn")[:rows, :columns]), scale


def _join_blocks(path: str, parts: Sequence[Any]) -> Arrays | None:
    if not all_of(Float8Blocks, parts):
        return None
    for part in parts:
        wanted = tuple(-(-extent // _BLOCK) for extent in part.weight.shape)
        if part.scale.shape != wanted:
            raise ParameterMismatch(
                f"{path} has block scales {list(part.scale.shape)} for a weight "
                f"{list(part.weight.shape)}, blocks of {_BLOCK} x {_BLOCK} need {list(wanted)}; "
                "choose q8f16_1, to which it can be converted"
            )
    if any(len(part.weight) % _BLOCK for part in parts[:-1]):
        raise UnsupportedModel(
            f"{path} joins matrices of {', '.join(str(len(p.weight)) for p in parts)} rows, whose "
            f"blocks of {_BLOCK} do not meet; choose q8f16_1, to which it can be converted"
        )
    return (
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.scale for part in parts]),
    )


def _checked(weight: NDArray[Any]) -> NDArray[np.float32]:
    values = np.asarray(weight).astype(np.float32)
    if not np.isfinite(values).all():
        raise CorruptFile("the weight holds NaN or infinite values; fetch the checkpoint again")
    return values


def _round(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round to the nearest 8-bit float, the largest where that would be infinite or NaN."""
    largest = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)
    rounded: NDArray[Any] = values.clip(-largest, largest).astype(numpy_dtype(dtype))
    return rounded


def native_storage(path: str, out_features: int, in_features: int, format_name: str) -> Storage:
    """Store the codes of a GGUF file; what has other codes is rounded to those of the format."""
    form = parse_format(format_name)

    def store(weight: NDArray[Any]) -> Arrays:
        if form.has_minimum:
            raise UnsupportedModel(
                f"{path} was planned to keep codes of its checkpoint, which has none; "
                "convert the model again"
            )
        return pack_codes([quantize_codes(weight, form)], form)

    def store_encoded(parts: Sequence[Any]) -> Arrays | None:
        return pack_codes(parts, form) if all_of(GroupCodes, parts) else None

    return Storage(format_specs(path, out_features, in_features, form), store, store_encoded)
