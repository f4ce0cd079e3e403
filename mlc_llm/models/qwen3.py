"""Qwen3 and Qwen3-Embedding: Llama with norms of query and key heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import attention_shape
from mlc_llm.models.qwen2 import PARTS, Qwen2Config
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Qwen2's windows; biases in attention are a switch."""

    attention_bias: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        bias = bool(config.get("attention_bias", False))
        return {**super().huggingface_fields(config), "attention_bias": bias}


class Qwen3Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised head by head."""

    def __init__(self, config: Qwen3Config, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape, self.rope = attention_shape(config, layer), config.rope_of(layer)
        width, bias = config.num_attention_heads * config.head_dim, config.attention_bias
        self.c_attn = Linear(config.hidden_size, config.qkv_features, dtype, bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.o_proj = Linear(width, config.hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = norm_heads(self.c_attn(x), self.q_norm, self.k_norm, self.shape)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


def build(config: Qwen3Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Qwen3Attention)


def build_embedding(config: Qwen3Config, dtype: str) -> CausalLM:
    """Build the module of Qwen3-Embedding, which has no output layer of its own."""
    return build(dataclasses.replace(config, tie_word_embeddings=True), dtype)


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), Qwen3Config, build, PARTS)
EMBEDDING = Family(
    "qwen3-embedding",
    ("Qwen3ForCausalLM", "Qwen3Model"),
    Qwen3Config,
    build_embedding,
    PARTS,
    base_prefix="model.",
    unused=("lm_head.",),
    embedding={"model_type": "decoder", "pooling_strategy": "last", "normalize": True},
)
