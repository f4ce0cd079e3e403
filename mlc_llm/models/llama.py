"""Llama 1, 2, 3.x and what has its architecture: TinyLlama, SmolLM, Vicuna, OpenLLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.models.base import PAGE_SIZE, CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.ops import Rows

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Llama's own switches: biases in attention and feed-forward layers."""

    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {
            **super().huggingface_fields(config),
            "attention_bias": bool(config.get("attention_bias", False)),
            "mlp_bias": bool(config.get("mlp_bias", False)),
        }


def attention_shape(config: DecoderConfig, layer: int) -> AttentionShape:
    """Return the attention of a layer; the KV dtype follows the pages it is given."""
    return AttentionShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        kv_dtype="float16",
        scale=config.head_dim**-0.5,
        window=config.window_of(layer),
        sinks=max(config.attention_sink_size, 0),
    )


class LlamaAttention(nn.Module):
    """Grouped-query attention with fused q, k and v."""

    def __init__(self, config: LlamaConfig, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape, self.rope = attention_shape(config, layer), config.rope_of(layer)
        width = config.num_attention_heads * config.head_dim
        bias = config.attention_bias
        self.qkv_proj = Linear(config.hidden_size, config.qkv_features, dtype, bias)
        self.o_proj = Linear(width, config.hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        return self.o_proj(kv.attend(layer, self.qkv_proj(x), self.shape, self.rope))


def build(config: LlamaConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, LlamaAttention, llama_mlp)


def llama_mlp(config: LlamaConfig, dtype: str, layer: int) -> GatedMLP:
    """Make a feed-forward layer; the configuration says whether it has biases."""
    del layer
    width = config.intermediate_size
    return GatedMLP(config.hidden_size, width, dtype, config.mlp_bias, config.hidden_act)


FAMILY = Family("llama", ("LlamaForCausalLM",), LlamaConfig, build, FUSED)
