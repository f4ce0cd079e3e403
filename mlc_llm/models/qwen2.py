"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows from some layer on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.llama import FUSED, attention_shape
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Layers from `max_window_layers` on use the sliding window, where there is one."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"position_embedding_base": ("rope_theta",)}

    max_window_layers: int = 0

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        return {
            **super().huggingface_fields(config),
            "sliding_window_size": window or -1,
            "max_window_layers": config.get("max_window_layers") or 0,
        }

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        return super().window_of(layer) if layer >= self.max_window_layers else -1


class Qwen2Attention(nn.Module):
    """Grouped-query attention; q, k and v fused with their biases as `c_attn`."""

    def __init__(self, config: Qwen2Config, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape, self.rope = attention_shape(config, layer), config.rope_of(layer)
        width = config.num_attention_heads * config.head_dim
        self.c_attn = Linear(config.hidden_size, config.qkv_features, dtype, bias=True)
        self.o_proj = Linear(width, config.hidden_size, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        return self.o_proj(kv.attend(layer, self.c_attn(x), self.shape, self.rope))


def build(config: Qwen2Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Qwen2Attention)


PARTS = {
    "self_attn.c_attn": FUSED["self_attn.qkv_proj"],
    "mlp.gate_up_proj": FUSED["mlp.gate_up_proj"],
}
FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), Qwen2Config, build, PARTS)
