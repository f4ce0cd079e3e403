"""Formats of single layers, by name, and codes packed into them. For weights quantized elsewhere.

A name is "q4_g32_z8": 4 bits, groups of 32 inputs, code 8 is zero; or "q4_g32_min", where groups
have a minimum. Scales and minima are float16. Does not know files, TVM or layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import TensorSpec
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.quantization.encoded import GroupCodes

# What a layer is quantized to whose checkpoint has another encoding: next to nothing is lost.
FALLBACK_FORMAT = "q8_g32_z128"
# What a tensor is called that is quantized in a way no format can hold.
OTHER_ENCODING = "other"

_NAME = re.compile(r"^q([4568])_g(16|32)_(?:min|z(\d{1,3}))$")
_SCALE_DTYPE = "float16"


def parse_format(name: str) -> GroupFormat:
    """Return the format of that name. Raises CorruptFile."""
    match = _NAME.match(name)
    if match is None:
        raise CorruptFile(
            f"the layer format {name!r:.40} is not known; convert the model again, or update "
            "mlc_llm if a newer release made it"
        )
    bits, group_size = int(match[1]), int(match[2])
    zero = None if match[3] is None else int(match[3])
    return GroupFormat(bits, group_size, _SCALE_DTYPE, False, zero, has_minimum=zero is None)


def join_formats(names: Sequence[str]) -> str:
    """Return the smallest format that holds the codes of all; for layers fused into one."""
    if OTHER_ENCODING in names:
        return FALLBACK_FORMAT
    if len(set(names)) == 1:
        return names[0]
    forms = [parse_format(name) for name in names]
    bits = max(form.bits for form in forms)
    group_size = min(form.group_size for form in forms)
    # Half a bit of a group of 16 has no word of its own.
    bits = 6 if (bits, group_size) == (5, 16) else bits
    zeros = {None if form.has_minimum else form.zero_point for form in forms}
    zero = zeros.pop() if len(zeros) == 1 else None
    return f"q{bits}_g{group_size}_" + ("min" if zero is None else f"z{zero}")


def format_specs(
    path: str, out_features: int, in_features: int, form: GroupFormat
) -> tuple[TensorSpec, TensorSpec]:
    """Return the specs of a layer's words and scales, as `pack_codes` makes them."""
    groups = form.num_groups(in_features)
    return (
        TensorSpec(f"{path}.q_weight", (out_features, groups * form.words_per_group), "uint32"),
        TensorSpec(f"{path}.q_scale", (out_features, groups * form.scales_per_group), _SCALE_DTYPE),
    )


def pack_codes(
    parts: Sequence[GroupCodes], form: GroupFormat
) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """Pack matrices, one below the other, that all fit a format; codes stay as they are.

    Returns words (out, words) and scales (out, groups), or scale and minimum by turns (out, 2 *
    groups). Scales are rounded to float16: by at most 2**-11 of themselves, not at all where the
    checkpoint has one scale for a group. Raises UnsupportedModel where float16 cannot hold them.
    """
    packed = [_pack_matrix(part, form) for part in parts]
    return np.concatenate([words for words, _ in packed]), np.concatenate([s for _, s in packed])


def quantize_codes(weight: NDArray[Any], form: GroupFormat) -> GroupCodes:
    """Round a weight (out, in) to the codes of a format without minima, to nearest.

    Inputs are filled up to whole groups, with zeros.
    Raises CorruptFile on NaN and infinity.
    """
    groups = form.num_groups(weight.shape[1])
    values = np.zeros((len(weight), groups * form.group_size), np.float32)
    values[:, : weight.shape[1]] = weight
    grouped = values.reshape(len(values), groups, -1)
    largest = np.abs(grouped).max(axis=2)
    if not np.isfinite(largest).all():
        raise CorruptFile("the weight holds NaN or infinite values; fetch the checkpoint again")
    top = (1 << form.bits) - 1 - form.zero_point
    # Codes are chosen for the scale as it is stored.
    scale = (largest / np.float32(top)).astype(_SCALE_DTYPE).astype(np.float32)
    divisor = np.where(scale == 0, np.float32(1), scale)[..., None]
    codes = np.rint(grouped / divisor).clip(-top, top) + form.zero_point
    return GroupCodes(codes.reshape(values.shape).astype(np.uint8), scale, form.zero_point)


def _pack_matrix(part: GroupCodes, form: GroupFormat) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    rows, width = part.codes.shape
    groups = width // form.group_size
    repeats = groups // part.scale.shape[1]
    scale = np.repeat(part.scale, repeats, axis=1)
    if form.has_minimum:
        minimum = np.float32(-part.zero) * part.scale if part.minimum is None else part.minimum
        scale = np.stack([scale, np.repeat(minimum, repeats, axis=1)], axis=2).reshape(rows, -1)
    stored = _as_stored(scale)
    return _pack_words(part.codes.reshape(rows, groups, -1), form).reshape(rows, -1), stored


def _as_stored(scale: NDArray[np.float32]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        stored = scale.astype(_SCALE_DTYPE)
    if not np.isfinite(stored).all():
        if not np.isfinite(scale).all():
            raise CorruptFile("a scale is NaN or infinite; fetch the checkpoint again")
        raise UnsupportedModel(
            f"a scale reaches {np.abs(scale).max():g}, too large for float16; "
            "choose a quantization with float32 scales, such as q4f32_1"
        )
    return stored


def _pack_words(codes: NDArray[np.uint8], form: GroupFormat) -> NDArray[np.uint32]:
    """Pack codes (rows, groups, group size) into words (rows, groups, words per group)."""
    rows, groups, size = codes.shape
    words = np.zeros((rows, groups, form.words_per_group), np.uint32)
    low_mask = np.uint8((1 << form.low_bits) - 1)
    low = (codes & low_mask).reshape(rows, groups, -1, form.values_per_word)
    for place in range(form.values_per_word):
        shift = np.uint32(place * form.low_bits)
        words[..., : form.low_words] |= low[..., place].astype(np.uint32) << shift
    if form.high_bits:
        for k in range(size):
            word, shift = form.high_bits_at(k)
            high = (codes[..., k] >> np.uint8(form.low_bits)).astype(np.uint32)
            words[..., form.low_words + word] |= high << np.uint32(shift)
    return words
