"""Nemotron: layer norms whose scale is one more than stored, and a squared ReLU without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm


@dataclass(frozen=True)
class NemotronConfig(LlamaConfig):
    """Llama's fields under a few other names."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rms_norm_eps": ("norm_eps",),
        "partial_rotary_factor": ("rope_percent", "rope_percentage"),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
    }


def mlp(config: LlamaConfig, dtype: str, layer: int) -> nn.Module:
    """Make a feed-forward layer."""
    del layer
    names = ("up_proj", "down_proj")
    width = config.intermediate_size
    return MLP(config.hidden_size, width, dtype, config.hidden_act, names, config.mlp_bias)


def _norm(width: int, eps: float, dtype: str) -> LayerNorm:
    return LayerNorm(width, eps, dtype, adds_one=True)


def build(config: NemotronConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, LlamaAttention, mlp, norm=_norm)


PARTS = {"self_attn.qkv_proj": FUSED["self_attn.qkv_proj"]}
FAMILY = Family("nemotron", ("NemotronForCausalLM",), NemotronConfig, build, PARTS)
