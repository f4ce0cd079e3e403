"""Gemma 1: Llama with scaled embeddings and norms whose weights are stored less one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, DecoderLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import add_one
from mlc_llm.nn import row_ops


@dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """Llama's fields; the activation has a name of its own."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"hidden_act": ("hidden_activation",)}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # The first configurations said "gelu"; the models were trained with its approximation.
        named = config.get("hidden_activation") or config.get("hidden_act")
        kind = "gelu_pytorch_tanh" if named in (None, "gelu") else named
        return super()._with_own_names({**config, "hidden_act": kind})


class GemmaLM(DecoderLM):
    """The usual decoder; what its layers add to is larger than the table's rows."""

    def embed(self, token_ids: nn.Tensor) -> nn.Tensor:
        """Return rows times the square root of their width, (n, hidden) float32."""
        return row_ops.scale(super().embed(token_ids), self.config.hidden_size**0.5)


def norms_plus_one(config: DecoderConfig, parameter: str) -> ParamRule | None:
    """Return the rule of norms, which hold in an artifact what they multiply with."""
    del config
    return ParamRule((parameter,), add_one) if parameter.endswith("norm.weight") else None


def build(config: GemmaConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, LlamaAttention, language_model=GemmaLM)


FAMILY = Family("gemma", ("GemmaForCausalLM",), GemmaConfig, build, FUSED, special=norms_plus_one)
