"""Mixtral: Mistral with experts in place of the feed-forward layer (Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig, take_int
from mlc_llm.models.llama import FUSED, LlamaAttention
from mlc_llm.models.mistral import MistralConfig
from mlc_llm.models.moe import check_experts, expert_rule
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import expert_ops, row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.moe import Experts, mix_experts
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """How many experts there are, and how many a token goes to; their width is that of Mistral."""

    num_local_experts: int = 0
    num_experts_per_tok: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.num_local_experts, self.num_experts_per_tok)

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {
            **super().huggingface_fields(config),
            "num_local_experts": take_int(config, "num_local_experts", "num_experts"),
            "num_experts_per_tok": take_int(config, "num_experts_per_tok"),
        }


class MixtralMoE(nn.Module):
    """The best experts of each token, weighted by the softmax of their logits alone."""

    def __init__(self, config: DecoderConfig, routing: Routing, dtype: str) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.routing, self.activation = routing, config.hidden_act
        self.gate = Linear(hidden, routing.num_experts, dtype)
        self.e1_e3 = Experts(routing.num_experts, hidden, 2 * width, dtype)
        self.e2 = Experts(routing.num_experts, width, hidden, dtype)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        routes = expert_ops.route(self.gate(x), self.routing)
        return mix_experts(
            x, routes, self.e1_e3, self.e2, lambda y: row_ops.gated(y, self.activation)
        )


def experts(config: MixtralConfig, dtype: str, layer: int) -> MixtralMoE:
    """Make what a layer has in place of a feed-forward layer."""
    del layer
    return MixtralMoE(config, Routing(config.num_local_experts, config.num_experts_per_tok), dtype)


def build(config: MixtralConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    names = DecoderNames(mlp="moe")
    return build_decoder(config, dtype, LlamaAttention, experts, names=names)


_EXPERTS = {"moe.e1_e3": ("w1", "w3"), "moe.e2": ("w2",)}


def _special(config: MixtralConfig, parameter: str) -> ParamRule | None:
    experts = "block_sparse_moe.experts"
    return expert_rule(parameter, _EXPERTS, config.num_local_experts, experts)


FAMILY = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    MixtralConfig,
    build,
    {**FUSED, "moe.gate": ("block_sparse_moe.gate",)},
    _special,
)
