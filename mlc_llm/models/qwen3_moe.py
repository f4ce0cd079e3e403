"""Qwen3-MoE: Qwen3 with experts, without a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder, gated_mlp
from mlc_llm.models.qwen2 import PARTS
from mlc_llm.models.qwen2_moe import Qwen2MoeConfig, QwenMoE, special_rule
from mlc_llm.models.qwen3 import Qwen3Attention


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen2MoeConfig):
    """Qwen2-MoE's experts; biases in attention are a switch, and a window is that of all layers."""

    attention_bias: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        bias = bool(config.get("attention_bias", False))
        return {**super().huggingface_fields(config), "attention_bias": bias}

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        del layer
        return self.sliding_window_size if self.sliding_window_size > 0 else -1


def _mlp(config: Qwen3MoeConfig, dtype: str, layer: int) -> nn.Module:
    if not config.has_experts(layer):
        return gated_mlp(config, dtype, layer)
    return QwenMoE(config, dtype)


def build(config: Qwen3MoeConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Qwen3Attention, _mlp)


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), Qwen3MoeConfig, build, PARTS, special_rule)
