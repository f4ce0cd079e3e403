"""Inverse frequencies of rotary embeddings, with the scalings of published models.

Scalings that depend on the length of a text (dynamic, longrope) are fixed by the context window of
the library: keys in the cache keep the angles they were written with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, UnsupportedModel

Frequencies = NDArray[np.float32]


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding: base, rotated dimensions, Hugging Face's scaling parameters, and the
    context window that the library is compiled for.

    is_interleaved: pairs are neighbours (2i, 2i + 1), as in GPT-J, not halves (i, i + dim / 2).
    """

    base: float
    rotary_dim: int
    scaling: Mapping[str, Any] | None = None
    context_len: int = 0
    is_interleaved: bool = False

    def inverse_frequencies(self) -> Frequencies:
        """Return (rotary_dim / 2) float32 inverse frequencies, scaling applied.

        Raises UnsupportedModel for a scaling we do not know, CorruptFile where a value is missing.
        """
        scale, _ = self._scaling_functions()
        try:
            return scale(self)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(
                f"RoPE scaling {scaling_kind(self.scaling)!r} has missing or wrong values "
                f"({error!r:.80}): {dict(self.scaling or {})!r:.200}"
            ) from None

    @property
    def table_scale(self) -> float:
        """Return what cosines and sines are multiplied with (attention scaling of YaRN)."""
        _, attention = self._scaling_functions()
        return attention(self)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a scaling parameter. Raises KeyError or ValueError without one."""
        value = (self.scaling or {}).get(name)
        if value is None:
            if default is None:
                raise KeyError(name)
            return default
        return float(value)

    def _scaling_functions(
        self,
    ) -> tuple[Callable[[RopeConfig], Frequencies], Callable[[RopeConfig], float]]:
        kind = scaling_kind(self.scaling)
        if kind not in _SCALINGS:
            raise UnsupportedModel(
                f"RoPE scaling {kind!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_SCALINGS)}"
            )
        return _SCALINGS[kind]


def scaling_kind(scaling: Mapping[str, Any] | None) -> str:
    """Return the kind of a HF `rope_scaling` object; "default" where there is none."""
    if not scaling:
        return "default"
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _unscaled(rope: RopeConfig, base: float | None = None) -> Frequencies:
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / rope.rotary_dim
    powers = np.power(np.float32(rope.base if base is None else base), exponents)
    return (1.0 / powers).astype(np.float32)


def _linear(rope: RopeConfig) -> Frequencies:
    return _unscaled(rope) / np.float32(rope.number("factor"))


def _dynamic(rope: RopeConfig) -> Frequencies:
    # NTK-aware: the base grows with how far the context goes beyond what was trained.
    factor, dim = rope.number("factor"), rope.rotary_dim
    trained = rope.number("original_max_position_embeddings", rope.context_len)
    growth = factor * max(rope.context_len, trained) / trained - (factor - 1)
    return _unscaled(rope, rope.base * growth ** (dim / (dim - 2)))


def _llama3(rope: RopeConfig) -> Frequencies:
    # Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between them.
    frequencies = _unscaled(rope)
    factor = rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    context = rope.number("original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies
    ramp = (context / wavelengths - low) / ((high - low) or 1.0)  # Llama 4 has no ramp
    blended = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, blended)
    return np.where(wavelengths < context / high, frequencies, scaled).astype(np.float32)


def _yarn(rope: RopeConfig) -> Frequencies:
    # Peng et al. 2023 (YaRN), section 3.2: few turns over the trained context are interpolated,
    # many kept, a ramp over the dimensions between.
    frequencies, dim = _unscaled(rope), rope.rotary_dim
    trained = rope.number("original_max_position_embeddings")

    def dimension(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dimension(rope.number("beta_fast", 32)), dimension(rope.number("beta_slow", 1))
    if (rope.scaling or {}).get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    places = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((places - low) / ((high - low) or 0.001), 0, 1).astype(np.float32)
    interpolated = frequencies / np.float32(rope.number("factor"))
    blended: Frequencies = (interpolated * ramp + frequencies * (1 - ramp)).astype(np.float32)
    return blended


def _yarn_attention(rope: RopeConfig) -> float:
    factor, scaling = rope.number("factor"), rope.scaling or {}
    if scaling.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return magnitude(1)


def _longrope(rope: RopeConfig) -> Frequencies:
    # Ding et al. 2024: a factor for each frequency, one list within the trained context and
    # another beyond it.
    trained = rope.number("original_max_position_embeddings")
    name = "long_factor" if rope.context_len > trained else "short_factor"
    factors = np.asarray((rope.scaling or {})[name], np.float32)
    if factors.shape != (rope.rotary_dim // 2,):
        raise ValueError(f"{name} has {factors.size} values, not {rope.rotary_dim // 2}")
    return (_unscaled(rope) / factors).astype(np.float32)


def _longrope_attention(rope: RopeConfig) -> float:
    if (rope.scaling or {}).get("attention_factor") is not None:
        return rope.number("attention_factor")
    trained = rope.number("original_max_position_embeddings")
    factor = rope.number("factor", rope.context_len / trained)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _no_attention_scale(rope: RopeConfig) -> float:
    del rope
    return 1.0


_SCALINGS: dict[str, tuple[Callable[[RopeConfig], Frequencies], Callable[[RopeConfig], float]]] = {
    "default": (_unscaled, _no_attention_scale),
    "linear": (_linear, _no_attention_scale),
    "dynamic": (_dynamic, _no_attention_scale),
    "llama3": (_llama3, _no_attention_scale),
    "yarn": (_yarn, _yarn_attention),
    "longrope": (_longrope, _longrope_attention),
    "su": (_longrope, _longrope_attention),  # an older name of longrope
}
SUPPORTED_SCALINGS = tuple(_SCALINGS)
