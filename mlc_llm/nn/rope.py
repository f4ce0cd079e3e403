"""Inverse frequencies of rotary embeddings, with the scalings of published models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import UnsupportedModel

SUPPORTED_SCALINGS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding: base, rotated dimensions, and HF's scaling parameters."""

    base: float
    rotary_dim: int
    scaling: Mapping[str, Any] | None = None

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """Return (rotary_dim / 2) float32 inverse frequencies, scaling applied.

        Raises UnsupportedModel for a scaling we do not know.
        """
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / self.rotary_dim
        frequencies = (1.0 / np.power(np.float32(self.base), exponents)).astype(np.float32)
        kind = scaling_kind(self.scaling)
        if kind == "default" or self.scaling is None:
            return frequencies
        if kind == "linear":
            return frequencies / np.float32(self.scaling["factor"])
        if kind == "llama3":
            return _scale_llama3(frequencies, self.scaling)
        raise UnsupportedModel(
            f"RoPE scaling {kind!r} is not supported; supported: {', '.join(SUPPORTED_SCALINGS)}"
        )


def scaling_kind(scaling: Mapping[str, Any] | None) -> str:
    """Return the kind of a HF `rope_scaling` object; "default" where there is none."""
    if not scaling:
        return "default"
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _scale_llama3(
    frequencies: NDArray[np.float32], scaling: Mapping[str, Any]
) -> NDArray[np.float32]:
    # Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between them.
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    ramp = (context / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, blended)
    return np.where(wavelengths < context / high, frequencies, scaled).astype(np.float32)
