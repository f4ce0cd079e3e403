"""MiniCPM: Llama with scaled embeddings, residuals and logits (Hu et al. 2024, section 3).

MiniCPM-MoE has experts, chosen as Mixtral's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, DecoderLM, Family, build_decoder, gated_mlp
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.internlm import PARTS
from mlc_llm.models.mixtral import MixtralMoE
from mlc_llm.models.moe import check_experts, expert_rule
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class MiniCPMConfig(DecoderConfig):
    """A decoder and its factors; dim_model_base is the width at which logits are not scaled.

    num_experts: 0 for none.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}

    scale_emb: float = 1
    scale_depth: float = 1
    dim_model_base: float = 1
    num_experts: int = 0
    num_experts_per_tok: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts:
            check_experts(self.num_experts, self.num_experts_per_tok)

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        counts = ("num_experts", "num_experts_per_tok")
        factors = ("scale_emb", "scale_depth", "dim_model_base")
        return {
            **super().huggingface_fields(config),
            **{name: config.get(name) or 1 for name in factors},
            **{name: config.get(name) or 0 for name in counts},
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> MiniCPMConfig:
        """Build from an artifact's `model_config`; MLC LLM's may have null for no experts."""
        counts = ("num_experts", "num_experts_per_tok")
        return super().from_json(
            {**model_config, **{name: model_config.get(name) or 0 for name in counts}}
        )


class MiniCPMLayer(nn.Module):
    """x + factor * attention(norm(x)), then x + factor * mlp(norm(x))."""

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], factor: float
    ) -> None:
        super().__init__()
        self.factor = factor
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        attended = self.self_attn(self.input_layernorm(x), kv, layer)
        x = ops.add(x, row_ops.scale(attended, self.factor))
        return ops.add(x, row_ops.scale(self.mlp(self.post_attention_layernorm(x)), self.factor))


class MiniCPMLM(DecoderLM):
    """The usual decoder with factors before and after it."""

    config: MiniCPMConfig

    def embed(self, token_ids: nn.Tensor) -> nn.Tensor:
        """Return what the first layer gets, (n, hidden) float32."""
        return row_ops.scale(super().embed(token_ids), self.config.scale_emb)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        config = self.config
        return row_ops.scale(super().logits(rows), config.dim_model_base / config.hidden_size)


def attention(config: MiniCPMConfig, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names = ("wqkv_pack", "o_proj")
    return FusedAttention(config, dtype, layer, names, bias=False, output_bias=False)


def mlp(config: MiniCPMConfig, dtype: str, layer: int) -> nn.Module:
    """Make the feed-forward layer, or the experts, of a layer."""
    if not config.num_experts:
        return gated_mlp(config, dtype, layer)
    return MixtralMoE(config, Routing(config.num_experts, config.num_experts_per_tok), dtype)


def build(config: MiniCPMConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""

    def layer(
        attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], names: DecoderNames
    ) -> nn.Module:
        del names
        factor = config.scale_depth / math.sqrt(config.num_hidden_layers)
        return MiniCPMLayer(attention, mlp, norm, factor)

    return build_decoder(config, dtype, attention, mlp, layer=layer, language_model=MiniCPMLM)


_EXPERTS = {"mlp.e1_e3": ("w1", "w3"), "mlp.e2": ("w2",)}


def _special(config: MiniCPMConfig, parameter: str) -> ParamRule | None:
    return expert_rule(parameter, _EXPERTS, config.num_experts, "mlp.experts")


FAMILY = Family("minicpm", ("MiniCPMForCausalLM",), MiniCPMConfig, build, PARTS, _special)
