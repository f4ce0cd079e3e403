"""Arcee's AFM: Llama with a squared ReLU in place of a gate (So et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.models import nemotron
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import LlamaAttention, LlamaConfig


@dataclass(frozen=True)
class ArceeConfig(LlamaConfig):
    """Llama's fields."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5, "hidden_act": "relu2"}


def build(config: ArceeConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, LlamaAttention, nemotron.mlp)


FAMILY = Family("arcee", ("ArceeForCausalLM",), ArceeConfig, build, nemotron.PARTS)
