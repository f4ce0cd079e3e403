"""Quantized checkpoints by the name of their method: which tensors make a weight, and how.

Reads `quantization_config` of `config.json`. The arithmetic is in packed_decode.py, the checkpoint
that uses it in dequantized.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.quantization.encoded import AwqArrays, Encoded, Float8Blocks
from mlc_llm.weights import packed_decode

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Arrays = Mapping[str, NDArray[Any]]

# Scales for activations and the KV cache, which are computed or not quantized here.
_UNUSED = tuple(
    f"{what}_{kind}"
    for what in ("input", "output", "activation", "k", "v", "q", "prob")
    for kind in ("scale", "zero_point")
)


_WORDS = ("int32", "uint32")
_BYTES = ("uint8",)
_COUNTS = ("int64", "int32")
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_NUMBERS = ("float64", "float32", "float16", "bfloat16", "float8_e8m0fnu")


@dataclass(frozen=True)
class PackedFormat:
    """How a method stores a weight, as several tensors `module.part` beside each other.

    parts has the dtypes of each part there may be, the first being the one every quantized weight
    has; optional are those that may be missing, unused those to be passed over. weight_name is what
    follows the module's name in an unquantized checkpoint. find_shape gives the shape of the weight
    from those of its parts, None where they do not belong together; decode gives its values, and
    encode what schemes can keep as it is, where there is such a scheme.
    """

    method: str
    parts: Mapping[str, tuple[str, ...]]
    find_shape: Callable[[Shapes], Shape | None]
    decode: Callable[[Arrays], NDArray[Any]]
    encode: Callable[[Arrays], Encoded | None] = lambda parts: None
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    weight_name: str = ".weight"

    @property
    def marker(self) -> str:
        """The part every quantized weight has."""
        return next(iter(self.parts))


def find_packed_format(settings: Mapping[str, Any], where: str) -> PackedFormat:
    """Return the format that a `quantization_config` describes; `where` names the file.

    Raises UnsupportedModel naming the method or the setting, CorruptFile on senseless values.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _FORMATS:
        raise UnsupportedModel(
            f"{where}: weights are quantized by {method!r:.60}, which cannot be read; "
            f"supported: {', '.join(_FORMATS)}. Use the original model"
        )
    return _FORMATS[method](_Settings(settings, where))


@dataclass(frozen=True)
class _Settings:
    values: Mapping[str, Any]
    where: str

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            if (value := self.values.get(name)) is not None:
                if type(value) is not int:
                    raise CorruptFile(f"{self.where}: {name} is {value!r:.40}, not a whole number")
                return value
        if default is None:
            raise CorruptFile(f"{self.where} lacks {names[0]}")
        return default

    def require(self, name: str, allowed: tuple[Any, ...]) -> Any:
        """Return a setting, the first of `allowed` where it is not there."""
        value = self.values.get(name)
        if value is None:
            value = allowed[0]
        if value not in allowed:
            raise UnsupportedModel(
                f"{self.where}: {name} {value!r:.60} is not supported; "
                f"supported: {', '.join(map(str, allowed))}. Use the original model"
            )
        return value

    def refuse(self, name: str) -> None:
        if self.values.get(name):
            raise UnsupportedModel(f"{self.where}: {name} is not supported; use the original model")


def _groups_fit(inputs: int, groups: int, group_size: int) -> bool:
    return groups == (1 if group_size == -1 else math.ceil(inputs / group_size))


def _group_size(settings: _Settings, default: int) -> int:
    size = settings.number("group_size", "q_group_size", default=default)
    if size != -1 and size < 1:
        raise CorruptFile(f"{settings.where}: group_size is {size}")
    return size


def _awq(settings: _Settings) -> PackedFormat:
    settings.require("version", ("gemm", "GEMM"))
    if settings.number("bits", "w_bit") != 4:
        raise UnsupportedModel(f"{settings.where}: AWQ has 4 bits, not {settings.values['bits']}")
    group_size = _group_size(settings, 128)

    def find_shape(shapes: Shapes) -> Shape | None:
        rows, words = shapes["qweight"]
        groups, columns = shapes["scales"]
        whole = group_size == -1 or rows % group_size == 0
        fits = columns == words * 8 and shapes["qzeros"] == (groups, words)
        return (columns, rows) if fits and whole and _groups_fit(rows, groups, group_size) else None

    def decode(parts: Arrays) -> NDArray[Any]:
        return packed_decode.decode_awq(parts["qweight"], parts["qzeros"], parts["scales"])

    def encode(parts: Arrays) -> Encoded:
        return AwqArrays(parts["qweight"], parts["qzeros"], parts["scales"])

    parts = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _NUMBERS}
    return PackedFormat("awq", parts, find_shape, decode, encode)


def _gptq(settings: _Settings) -> PackedFormat:
    bits = settings.number("bits")
    if bits not in (2, 3, 4, 8):
        raise UnsupportedModel(f"{settings.where}: GPTQ of {bits} bits; 2, 3, 4 and 8 work")
    group_size = _group_size(settings, 128)
    version = settings.require("checkpoint_format", ("gptq", "gptq_v2"))
    settings.require("pack_dtype", ("int32", "torch.int32"))
    settings.refuse("is_marlin_format")
    settings.refuse("dynamic")

    def find_shape(shapes: Shapes) -> Shape | None:
        words, columns = shapes["qweight"]
        groups, scaled = shapes["scales"]
        rows = words * 32 // bits
        fits = scaled == columns and words * 32 % bits == 0 and columns * bits % 32 == 0
        fits = fits and shapes["qzeros"] == (groups, columns * bits // 32)
        fits = fits and shapes.get("g_idx", (rows,)) == (rows,)
        return (columns, rows) if fits and _groups_fit(rows, groups, group_size) else None

    def decode(parts: Arrays) -> NDArray[Any]:
        rows = parts["qweight"].shape[0] * 32 // bits
        per_group = rows if group_size == -1 else group_size
        groups = parts.get("g_idx")
        if groups is None:
            groups = np.arange(rows, dtype=np.int32) // per_group
        return packed_decode.decode_gptq(
            parts["qweight"],
            parts["qzeros"],
            parts["scales"],
            groups,
            bits,
            zero_offset=1 if version == "gptq" else 0,
        )

    parts = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _NUMBERS, "g_idx": _WORDS}
    return PackedFormat("gptq", parts, find_shape, decode, optional=("g_idx",))


def _block_size(settings: _Settings, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or [type(n) for n in value] != [int, int] or min(value) < 1:
        raise CorruptFile(f"{settings.where}: weight_block_size is {value!r:.40}")
    return value[0], value[1]


def _scale_fits(weight: Shape, scale: Shape, block_size: tuple[int, int] | None) -> bool:
    if block_size is not None:
        if len(weight) < 2 or len(scale) != len(weight) or scale[:-2] != weight[:-2]:
            return False
        blocks = zip(weight[-2:], block_size, strict=True)
        return scale[-2:] == tuple(math.ceil(extent / size) for extent, size in blocks)
    if math.prod(scale) == 1:
        return True
    return (
        len(scale) == len(weight) >= 2
        and scale[-1] == 1
        and scale[-2] in (1, weight[-2])
        and scale[:-2] == weight[:-2]
    )


def _scaled(
    method: str, block_size: tuple[int, int] | None, dtypes: tuple[str, ...]
) -> PackedFormat:
    """Return the format of 8-bit values under the plain name and scales beside them.

    Fine-grained checkpoints call the factor of a block or tensor the inverse of a scale.
    """
    scales, activations = ("weight_scale", "weight_scale_inv"), ("activation_scale", "input_scale")

    def find_shape(shapes: Shapes) -> Shape | None:
        weight, found = shapes["weight"], [shapes[name] for name in scales if name in shapes]
        return weight if len(found) == 1 and _scale_fits(weight, found[0], block_size) else None

    def decode(parts: Arrays) -> NDArray[Any]:
        steps = next(parts[name] for name in scales if name in parts).astype(np.float32)
        if block_size is None and steps.size == 1:
            steps = steps.reshape(())
        return packed_decode.decode_scaled(parts["weight"], steps, block_size)

    def encode(parts: Arrays) -> Encoded | None:
        weight = parts["weight"]
        if block_size is None or weight.ndim != 2 or weight.dtype.name != "float8_e4m3fn":
            return None
        steps = next(parts[name] for name in scales if name in parts).astype(np.float32)
        static = [parts[name] for name in activations if name in parts]
        activation = float(static[0].reshape(-1)[0]) if static and static[0].size == 1 else None
        return Float8Blocks(weight, steps, activation)

    optional = (*scales, *activations)
    parts = {"weight": dtypes, **dict.fromkeys(optional, _NUMBERS)}
    return PackedFormat(method, parts, find_shape, decode, encode, optional, _UNUSED)


def _fp8(settings: _Settings) -> PackedFormat:
    block_size = _block_size(settings, settings.values.get("weight_block_size"))
    return _scaled("fp8", block_size, _FLOAT8)


def _compressed_tensors(settings: _Settings) -> PackedFormat:
    layout = settings.require(
        "format", ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
    )
    sparsity = settings.values.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedModel(f"{settings.where}: sparse weights are not supported")
    groups = settings.values.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise UnsupportedModel(
            f"{settings.where}: config_groups must name one way for all weights to be stored"
        )
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CorruptFile(f"{settings.where}: config_groups says nothing of weights")
    details = _Settings(weights, settings.where)
    if layout == "pack-quantized":
        return _packed_rows(details)
    bits = details.number("num_bits")
    kind = details.require("type", ("float", "int"))
    strategy = details.require("strategy", ("tensor", "channel", "block"))
    if bits != 8 or (kind == "int" and weights.get("symmetric") is False):
        raise UnsupportedModel(
            f"{settings.where}: {layout} weights of {bits} bits, type {kind}, are not supported"
        )
    block = _block_size(details, weights.get("block_structure")) if strategy == "block" else None
    if strategy == "block" and block is None:
        raise CorruptFile(f"{settings.where} lacks block_structure")
    dtypes = _FLOAT8 if kind == "float" else ("int8",)
    return _scaled("compressed-tensors", block, dtypes)


def _packed_rows(settings: _Settings) -> PackedFormat:
    bits = settings.number("num_bits")
    if bits not in (4, 8) or settings.require("type", ("int",)) != "int":
        raise UnsupportedModel(f"{settings.where}: packed weights of {bits} bits; 4 and 8 work")
    strategy = settings.require("strategy", ("group", "channel"))
    group_size = _group_size(settings, -1) if strategy == "group" else -1
    is_symmetric = settings.values.get("symmetric", True) is not False
    per_word = 32 // bits

    def find_shape(shapes: Shapes) -> Shape | None:
        rows, words = shapes["weight_packed"]
        scaled, groups = shapes["weight_scale"]
        # The number of inputs is a value of weight_shape; where it is a multiple of what a word
        # holds, as it is in all models we know of, it follows from the number of words.
        columns = words * per_word
        fits = scaled == rows and _groups_fit(columns, groups, group_size)
        zeros = (math.ceil(rows / per_word), groups)
        fits = fits and shapes.get("weight_zero_point", zeros) == zeros
        fits = fits and is_symmetric == ("weight_zero_point" not in shapes)
        fits = fits and shapes.get("weight_g_idx", (columns,)) == (columns,)
        return (rows, columns) if fits and shapes["weight_shape"] == (2,) else None

    def decode(parts: Arrays) -> NDArray[Any]:
        packed, scale = parts["weight_packed"], parts["weight_scale"].astype(np.float32)
        rows, columns = len(packed), packed.shape[1] * per_word
        if tuple(parts["weight_shape"].tolist()) != (rows, columns):
            raise CorruptFile(f"weight_shape is not {rows} by {columns}, as the packed words are")
        group = parts.get("weight_g_idx")
        if group is None:
            size = columns if group_size == -1 else group_size
            group = np.arange(columns, dtype=np.int32) // size
        zero = parts.get("weight_zero_point")
        if zero is not None:  # packed along the rows
            zero = packed_decode.unpack_bits(zero.T, bits).T[:rows]
        return packed_decode.decode_packed_rows(packed, scale, zero, group, bits)

    optional = {"weight_zero_point": _WORDS, "weight_g_idx": _WORDS}
    return PackedFormat(
        "compressed-tensors",
        {"weight_packed": _WORDS, "weight_scale": _NUMBERS, "weight_shape": _COUNTS, **optional},
        find_shape,
        decode,
        optional=tuple(optional),
        unused=_UNUSED,
    )


def _mxfp4(settings: _Settings) -> PackedFormat:
    del settings

    def find_shape(shapes: Shapes) -> Shape | None:
        experts, rows, groups, half = shapes["blocks"]
        fits = half == 16 and shapes["scales"] == (experts, rows, groups)
        return (experts, groups * 32, rows) if fits else None

    def decode(parts: Arrays) -> NDArray[Any]:
        return packed_decode.decode_mxfp4(parts["blocks"], parts["scales"])

    parts = {"blocks": _BYTES, "scales": _BYTES}
    return PackedFormat("mxfp4", parts, find_shape, decode, weight_name="")


_FORMATS: dict[str, Callable[[_Settings], PackedFormat]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
}
