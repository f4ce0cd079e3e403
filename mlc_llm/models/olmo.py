"""OLMo: Llama with layer norms that learn nothing, and bounds for q, k and v in some sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig
from mlc_llm.nn import row_ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class OlmoConfig(LlamaConfig):
    """Llama's fields; q, k and v stay within +-`clip_qkv` where it is given."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}

    clip_qkv: float | None = None

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {**super().huggingface_fields(config), "clip_qkv": config.get("clip_qkv")}


class OlmoAttention(LlamaAttention):
    """Llama's with bounded q, k and v."""

    def __init__(self, config: OlmoConfig, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.bound = config.clip_qkv

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = self.qkv_proj(x)
        if self.bound is not None:
            qkv = row_ops.clip(qkv, self.bound)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


def _norm(width: int, eps: float, dtype: str) -> LayerNorm:
    return LayerNorm(width, eps, dtype, affine=False)


def build(config: OlmoConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, OlmoAttention, norm=_norm)


FAMILY = Family("olmo", ("OlmoForCausalLM",), OlmoConfig, build, FUSED)
