"""InternLM: Llama with biases in attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED, LlamaConfig


@dataclass(frozen=True)
class InternLMConfig(LlamaConfig):
    """Llama's fields; `bias` is that of attention, `rotary` may hold the base."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention_bias": ("bias",)}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"attention_bias": True}

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        base = (config.get("rotary") or {}).get("base")
        return super().huggingface_fields(
            config if base is None else {**config, "rope_theta": base}
        )


def attention(config: InternLMConfig, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names, bias = ("wqkv_pack", "o_proj"), config.attention_bias
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=bias)


def build(config: InternLMConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention)


PARTS = {
    "self_attn.wqkv_pack": FUSED["self_attn.qkv_proj"],
    "mlp.gate_up_proj": FUSED["mlp.gate_up_proj"],
}
FAMILY = Family("internlm", ("InternLMForCausalLM",), InternLMConfig, build, PARTS)
