"""Ernie 4.5, the dense models: Llama with neighbours rotated, and biases everywhere or nowhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.models.base import Family
from mlc_llm.models.llama import FUSED, LlamaConfig, build
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class Ernie45Config(LlamaConfig):
    """Llama's fields; one switch is for all biases."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_bias": ("use_bias",),
        "mlp_bias": ("use_bias",),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding of neighbours."""
        return tuple(dataclasses.replace(rope, is_interleaved=True) for rope in super().ropes)


FAMILY = Family("ernie4_5", ("Ernie4_5ForCausalLM",), Ernie45Config, build, FUSED)
