"""Orion: Llama with layer norms."""

from __future__ import annotations

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig, llama_mlp
from mlc_llm.nn.norm import LayerNorm


def build(config: LlamaConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, LlamaAttention, llama_mlp, norm=LayerNorm)


FAMILY = Family("orion", ("OrionForCausalLM",), LlamaConfig, build, FUSED)
