"""Seed-OSS: Llama with biases on q, k and v alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED, LlamaConfig, llama_mlp


@dataclass(frozen=True)
class SeedOssConfig(LlamaConfig):
    """Llama's fields, and whether the output of attention has a bias as well."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"attention_bias": True, "head_dim": 128}

    attention_out_bias: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        bias = bool(config.get("attention_out_bias", False))
        return {**super().huggingface_fields(config), "attention_out_bias": bias}


def attention(config: SeedOssConfig, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names = ("qkv_proj", "o_proj")
    bias, output_bias = config.attention_bias, config.attention_out_bias
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=output_bias)


def build(config: SeedOssConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, llama_mlp)


FAMILY = Family("seed_oss", ("SeedOssForCausalLM",), SeedOssConfig, build, FUSED)
