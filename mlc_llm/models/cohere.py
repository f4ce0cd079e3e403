"""Cohere's Command R and Aya 23: attention and feed-forward side by side, neighbours rotated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, DecoderLM, Family, build_decoder
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED, LlamaConfig
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class CohereConfig(LlamaConfig):
    """Llama's fields, the factor of logits, and whether q and k are normalised head by head."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"rms_norm_eps": ("layer_norm_eps",)}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}

    logit_scale: float = 0.0625
    use_qk_norm: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        scale = config.get("logit_scale")
        return {
            **super().huggingface_fields(config),
            "logit_scale": 0.0625 if scale is None else float(scale),
            "use_qk_norm": bool(config.get("use_qk_norm", False)),
        }

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding of neighbours."""
        return tuple(dataclasses.replace(rope, is_interleaved=True) for rope in super().ropes)


def attention(config: CohereConfig, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer, with norms of heads in the largest models."""
    names, bias = ("qkv_proj", "out_proj"), config.attention_bias
    has_norms = config.use_qk_norm
    return FusedAttention(
        config, dtype, layer, names, bias=bias, output_bias=bias, has_head_norms=has_norms
    )


class CohereMLP(nn.Module):
    """down(act(gate(x)) * up(x)); MLC LLM keeps gate and up apart."""

    def __init__(self, config: CohereConfig, dtype: str, layer: int) -> None:
        super().__init__()
        del layer
        hidden_size, width = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.gate_proj = Linear(hidden_size, width, dtype)
        self.up_proj = Linear(hidden_size, width, dtype)
        self.down_proj = Linear(width, hidden_size, dtype)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32."""
        gate_up = row_ops.join(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(row_ops.gated(gate_up, self.activation))


class ParallelLayer(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        names: DecoderNames,
    ) -> None:
        super().__init__()
        del names
        self.self_attn, self.mlp, self.input_layernorm = attention, mlp, norm()

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        normed = self.input_layernorm(x)
        return ops.add(ops.add(x, self.self_attn(normed, kv, layer)), self.mlp(normed))


class CohereLM(DecoderLM):
    """The usual decoder with scaled logits."""

    config: CohereConfig

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return row_ops.scale(super().logits(rows), self.config.logit_scale)


def _norm(width: int, eps: float, dtype: str) -> LayerNorm:
    return LayerNorm(width, eps, dtype, bias=False)


def build(config: CohereConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(
        config,
        dtype,
        attention,
        CohereMLP,
        norm=_norm,
        layer=ParallelLayer,
        language_model=CohereLM,
    )


PARTS = {
    "self_attn.qkv_proj": FUSED["self_attn.qkv_proj"],
    "self_attn.out_proj": ("self_attn.o_proj",),
}
FAMILY = Family("cohere", ("CohereForCausalLM",), CohereConfig, build, PARTS)
