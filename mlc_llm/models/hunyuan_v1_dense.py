"""HunYuan, the dense models: Llama with norms of query and key heads after their rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import scaling_kind


@dataclass(frozen=True)
class HunYuanConfig(LlamaConfig):
    """Llama's fields; a "dynamic" scaling with `alpha` does nothing but stretch the base."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        fields = super().huggingface_fields(config)
        scaling, size = fields["rope_scaling"], fields["head_dim"]
        if scaling_kind(scaling) == "dynamic" and scaling.get("alpha"):
            # NTK-aware, for a context that was known when the model was trained.
            fields["position_embedding_base"] *= float(scaling["alpha"]) ** (size / (size - 2))
            fields["rope_scaling"] = None
        return fields


class HunYuanAttention(LlamaAttention):
    """Llama's with norms between rotation and scores."""

    def __init__(self, config: HunYuanConfig, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        turned = kv.rotate(self.qkv_proj(x), self.shape)
        qkv = norm_heads(turned, self.query_layernorm, self.key_layernorm, self.shape)
        return self.o_proj(kv.attend(layer, qkv, self.shape, rope=None))


def build(config: HunYuanConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, HunYuanAttention)


FAMILY = Family("hunyuan_v1_dense", ("HunYuanDenseV1ForCausalLM",), HunYuanConfig, build, FUSED)
