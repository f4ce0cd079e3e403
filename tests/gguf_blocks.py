"""Random GGUF blocks of any encoding, with sane scales: files of them look like models."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

# Encoding -> the bytes at which a block has a float16: scales, then minima.
_HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}
# What a block's own scale multiplies at most, about.
_LARGEST = {"Q2_K": 45, "Q3_K": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4064, "IQ4_XS": 4064}
_LARGEST_SIMPLE = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 128, "IQ4_NL": 127}


def random_blocks(
    rng: np.random.Generator, kind: gguf.GGMLQuantizationType, rows: int, columns: int
) -> NDArray[Any]:
    """Return (rows, bytes of a row) uint8; the values they stand for reach about 0.2."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    largest = {**_LARGEST, **_LARGEST_SIMPLE}[kind.name]
    for index, at in enumerate(_HALVES[kind.name]):
        scale = rng.uniform(0.1, 0.2, (len(blocks), 1)) / largest
        if index == 1:
            # A block's minimum is added as it is, or subtracted, times up to 15 or 63.
            scale *= -largest / 2 if kind.name in ("Q4_1", "Q5_1") else largest / 2 / 40
        blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
