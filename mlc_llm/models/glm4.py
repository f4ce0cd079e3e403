"""GLM-4 as transformers keeps it: Llama with half of each head rotated, as neighbours.

The models of April 2025 (GLM-4-0414) also have a norm behind each half of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.gemma2 import Gemma2Layer
from mlc_llm.models.llama import FUSED, LlamaConfig
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class Glm4Config(LlamaConfig):
    """Llama's fields; biases are those of q, k and v."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1.5625e-7,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "head_dim": 128,
    }

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding of neighbours."""
        return tuple(dataclasses.replace(rope, is_interleaved=True) for rope in super().ropes)


def attention(config: Glm4Config, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names, bias = ("qkv_proj", "o_proj"), config.attention_bias
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=False)


def build_glm(config: Glm4Config, dtype: str) -> CausalLM:
    """Build the unquantized module of the first models with parameters of `dtype`."""
    return build_decoder(config, dtype, attention)


def build(config: Glm4Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, layer=Gemma2Layer)


_PARTS = {"self_attn.qkv_proj": FUSED["self_attn.qkv_proj"]}
# Ours -> what checkpoints call these norms.
_NORMS = {
    "post_attention_layernorm": ("post_self_attn_layernorm",),
    "pre_feedforward_layernorm": ("post_attention_layernorm",),
    "post_feedforward_layernorm": ("post_mlp_layernorm",),
}
FAMILY = Family("glm4", ("Glm4ForCausalLM",), Glm4Config, build, {**_PARTS, **_NORMS})
FIRST = Family("glm", ("GlmForCausalLM",), Glm4Config, build_glm, _PARTS)
