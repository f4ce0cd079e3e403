"""Gemma 2: Gemma with norms around both halves of a layer, bounded scores, windows in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.checking import check_layer_types
from mlc_llm.models.gemma import GemmaConfig, GemmaLM, norms_plus_one
from mlc_llm.models.llama import FUSED, LlamaAttention, attention_shape
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.ops import Rows

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """Gemma's fields, bounds of scores and logits, and which layers have the window.

    layer_types: Hugging Face's name of each layer's kind, None for the family's own pattern.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **GemmaConfig.ALIASES,
        "sliding_window_size": ("sliding_window",),
    }

    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    query_pre_attn_scalar: float = 256
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_types(self.layer_types, self.num_hidden_layers, (_LOCAL, _GLOBAL))

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {
            **super().huggingface_fields(config),
            "sliding_window_size": config.get("sliding_window_size") or -1,
            "attn_logit_softcapping": config.get("attn_logit_softcapping"),
            "final_logit_softcapping": config.get("final_logit_softcapping"),
            "query_pre_attn_scalar": config.get("query_pre_attn_scalar") or 256,
            "layer_types": config.get("layer_types"),
        }

    def is_local(self, layer: int) -> bool:
        """Return whether a layer has the window: the first of every two."""
        return self.layer_types[layer] == _LOCAL if self.layer_types else layer % 2 == 0

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        return super().window_of(layer) if self.is_local(layer) else -1


def gemma_shape(config: Gemma2Config, layer: int) -> AttentionShape:
    """Return the attention of a layer: a scale of its own, and bounded scores."""
    return dataclasses.replace(
        attention_shape(config, layer),
        scale=config.query_pre_attn_scalar**-0.5,
        soft_cap=config.attn_logit_softcapping or 0.0,
    )


class Gemma2Attention(LlamaAttention):
    """Llama's with Gemma's scores."""

    def __init__(self, config: Gemma2Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.shape = gemma_shape(config, layer)


class Gemma2Layer(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        names: DecoderNames,
    ) -> None:
        super().__init__()
        del names
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        attended = self.self_attn(self.input_layernorm(x), kv, layer)
        x = ops.add(x, ops.materialize(self.post_attention_layernorm(attended)))
        made = self.mlp(self.pre_feedforward_layernorm(x))
        return ops.add(x, ops.materialize(self.post_feedforward_layernorm(made)))


class Gemma2LM(GemmaLM):
    """Gemma with bounded logits."""

    config: Gemma2Config

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        logits, cap = super().logits(rows), self.config.final_logit_softcapping
        return logits if cap is None else row_ops.soft_cap(logits, cap)


def build(config: Gemma2Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Gemma2Attention, layer=Gemma2Layer, language_model=Gemma2LM)


FAMILY = Family(
    "gemma2", ("Gemma2ForCausalLM",), Gemma2Config, build, FUSED, special=norms_plus_one
)
