"""Formats of single layers: names, what holds the codes of several, and the words they make."""

import numpy as np
import pytest
from packed_layouts import unpack_format

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.quantization.encoded import GroupCodes
from mlc_llm.quantization.formats import (
    FALLBACK_FORMAT,
    OTHER_ENCODING,
    format_specs,
    join_formats,
    pack_codes,
    parse_format,
    quantize_codes,
)

NAMES = ["q4_g32_z8", "q4_g32_min", "q5_g32_z16", "q5_g32_min", "q8_g32_z128", "q4_g16_z4"]
NAMES += ["q4_g16_min", "q6_g16_z32", "q6_g16_min", "q8_g16_min", "q6_g32_min"]


def random_codes(rng, name, rows=5, columns=96):
    form = parse_format(name)
    groups = columns // form.group_size
    scale = rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
    minimum = None
    if form.has_minimum:
        minimum = rng.uniform(-1, 1, scale.shape).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 1 << form.bits, (rows, columns), dtype=np.uint8)
    return GroupCodes(codes, scale, form.zero_point, minimum)


def value_of(part):
    size = part.codes.shape[1] // part.scale.shape[1]
    weight = (part.codes.astype(np.float64) - part.zero) * np.repeat(part.scale, size, axis=1)
    if part.minimum is not None:
        weight += np.repeat(part.minimum, size, axis=1)
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_codes_come_back_exactly(name):
    part = random_codes(np.random.default_rng(1), name)
    words, scales = pack_codes([part], parse_format(name))
    np.testing.assert_array_equal(unpack_format(words, scales, name, 96), value_of(part))
    specs = format_specs("a", 5, 96, parse_format(name))
    assert [spec.shape for spec in specs] == [words.shape, scales.shape]
    assert [spec.dtype for spec in specs] == ["uint32", "float16"]
    assert words.nbytes == 5 * 96 * parse_format(name).bits // 8


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["q4_g32_z8"] * 3, "q4_g32_z8"),
        (["q4_g32_min", "q4_g32_min", "q6_g16_z32"], "q6_g16_min"),
        (["q4_g32_z8", "q8_g32_z128"], "q8_g32_min"),
        (["q5_g32_min", "q4_g16_min"], "q6_g16_min"),
        (["q4_g32_min", OTHER_ENCODING], FALLBACK_FORMAT),
    ],
)
def test_fused_layers_hold_the_codes_of_all(names, joined):
    assert join_formats(names) == joined
    if OTHER_ENCODING in names:
        return
    rng = np.random.default_rng(2)
    parts = [random_codes(rng, name) for name in names]
    words, scales = pack_codes(parts, parse_format(joined))
    found = unpack_format(words, scales, joined, 96)
    expected = np.concatenate([value_of(part) for part in parts])
    # The minimum that stands for a zero point is rounded to float16.
    assert np.abs(found - expected).max() <= 128 * 0.1 * 2**-11


def test_scales_are_rounded_to_float16_and_no_further():
    codes = np.full((1, 32), 15, np.uint8)
    part = GroupCodes(codes, np.full((1, 1), 0.1234567, np.float32), 8)
    _, scales = pack_codes([part], parse_format("q4_g32_z8"))
    assert scales[0, 0] == np.float16(0.1234567)


def test_bad_scales_are_refused():
    codes = np.zeros((1, 32), np.uint8)
    form = parse_format("q4_g32_z8")
    with pytest.raises(CorruptFile, match="NaN or infinite"):
        pack_codes([GroupCodes(codes, np.full((1, 1), np.inf, np.float32), 8)], form)
    with pytest.raises(UnsupportedModel, match="too large for float16"):
        pack_codes([GroupCodes(codes, np.full((1, 1), 1e6, np.float32), 8)], form)


@pytest.mark.parametrize("columns", [96, 75])
def test_rounding_to_the_fallback_format(columns):
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((4, columns)).astype(np.float32)
    weight[1, :32] = 0
    form = parse_format(FALLBACK_FORMAT)
    words, scales = pack_codes([quantize_codes(weight, form)], form)
    found = unpack_format(words, scales, FALLBACK_FORMAT, columns)
    steps = np.repeat(scales.astype(np.float64), 32, axis=1)[:, :columns]
    assert (np.abs(found - weight) <= steps * 0.5001).all()
    with pytest.raises(CorruptFile, match="NaN or infinite"):
        quantize_codes(np.full((1, 32), np.nan, np.float32), form)


@pytest.mark.parametrize("name", ["q7_g32_min", "q4_g64_min", "", "q4_g32_z8 ", "other"])
def test_unknown_names_are_refused(name):
    with pytest.raises(CorruptFile, match="is not known"):
        parse_format(name)
