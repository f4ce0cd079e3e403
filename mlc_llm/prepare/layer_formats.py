"""Formats of single layers, for schemes that keep the codes of a checkpoint. Reads no tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.models.base import Family
    from mlc_llm.models.config import DecoderConfig
    from mlc_llm.weights.source import WeightSource


def read_layer_formats(
    source: Path, family: Family, config: DecoderConfig, quantization: str
) -> dict[str, str]:
    """Return the formats of layers of a model whose scheme has them, {} for other schemes."""
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.weights.open import open_source

    if get_scheme(quantization).kind != "gguf":
        return {}
    with contextlib.closing(open_source(source)) as weights:
        return find_layer_formats(weights, family, config, quantization)


def find_layer_formats(
    weights: WeightSource, family: Family, config: DecoderConfig, quantization: str
) -> dict[str, str]:
    """Return the formats of the layers of an open checkpoint, {} for schemes that have none.

    Raises OptionError where the scheme keeps codes and the checkpoint has none.
    """
    from mlc_llm.quantization.apply import native_formats
    from mlc_llm.quantization.schemes import get_scheme
    from mlc_llm.weights.source import EncodedSource

    scheme = get_scheme(quantization)
    if scheme.kind != "gguf":
        return {}
    formats: dict[str, str] = {}
    if isinstance(weights, EncodedSource):
        formats = native_formats(family, config, scheme, weights.encoding)
    if not formats:
        raise OptionError(
            f"quantization {quantization} keeps the codes of a GGUF file, and "
            f"{weights.files()[0]} has none; choose q4f16_1 or q8f16_1"
        )
    return formats


def has_codes(source: Path) -> bool:
    """Return whether a GGUF file holds weights that are quantized and can stay as they are.

    Models with experts cannot. Raises ModelError.
    """
    from mlc_llm.quantization.formats import OTHER_ENCODING
    from mlc_llm.weights.open import open_source
    from mlc_llm.weights.source import EncodedSource

    with contextlib.closing(open_source(source)) as weights:
        if not isinstance(weights, EncodedSource) or _has_experts(weights.config):
            return False
        found = (weights.encoding(name) for name in weights.names())
        return any(name not in (None, OTHER_ENCODING) for name in found)


def _has_experts(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
