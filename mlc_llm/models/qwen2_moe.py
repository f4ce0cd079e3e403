"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts, and one that all tokens share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, Family, build_decoder, gated_mlp
from mlc_llm.models.config import take_int
from mlc_llm.models.moe import EXPERT_PARTS, check_experts, expert_rule
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.qwen2 import PARTS, Qwen2Attention, Qwen2Config
from mlc_llm.nn import expert_ops, ops, row_ops
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.moe import Experts, mix_experts
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class Qwen2MoeConfig(Qwen2Config):
    """Sizes of the experts, and which layers have them: every `decoder_sparse_step`-th one that is
    not among `mlp_only_layers`. layer_types: "sliding_attention" marks layers with a window.
    """

    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    num_experts: int = 0
    decoder_sparse_step: int = 1
    norm_topk_prob: bool = False
    mlp_only_layers: Sequence[int] = ()
    layer_types: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mlp_only_layers, (list, tuple)):
            raise CorruptFile(
                f"model configuration: mlp_only_layers is {self.mlp_only_layers!r:.80}"
            )
        sizes = (self.moe_intermediate_size, self.decoder_sparse_step)
        check_experts(self.num_experts, self.num_experts_per_tok, *sizes)

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        if config.get("qkv_bias") is False:
            raise UnsupportedModel("Qwen2-MoE without biases of q, k and v is not supported")
        return {
            **super().huggingface_fields(config),
            "moe_intermediate_size": take_int(config, "moe_intermediate_size"),
            "shared_expert_intermediate_size": config.get("shared_expert_intermediate_size") or 0,
            "num_experts_per_tok": take_int(config, "num_experts_per_tok"),
            "num_experts": take_int(config, "num_experts", "num_local_experts"),
            "decoder_sparse_step": take_int(
                {"decoder_sparse_step": 1, **config}, "decoder_sparse_step"
            ),
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
            "mlp_only_layers": config.get("mlp_only_layers") or (),
            "layer_types": config.get("layer_types") or (),
        }

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        has_window = list(self.layer_types[layer : layer + 1]) == ["sliding_attention"]
        return self.sliding_window_size if has_window and self.sliding_window_size > 0 else -1

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts; others have a feed-forward layer like Qwen2's."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class QwenMoE(nn.Module):
    """Experts chosen by the softmax of the gate's logits, without a shared one (Qwen3-MoE)."""

    def __init__(self, config: Qwen2MoeConfig, dtype: str) -> None:
        super().__init__()
        hidden, width, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.routing = Routing(count, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
        self.activation = config.hidden_act
        self.gate = Linear(hidden, count, dtype)
        self.moe_gate_up_proj = Experts(count, hidden, 2 * width, dtype)
        self.moe_down_proj = Experts(count, width, hidden, dtype)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        routes = expert_ops.route(self.gate(x), self.routing)
        return mix_experts(
            x,
            routes,
            self.moe_gate_up_proj,
            self.moe_down_proj,
            lambda y: row_ops.gated(y, self.activation),
        )


class Qwen2MoE(QwenMoE):
    """Experts, and a shared one whose share is the sigmoid of a gate of its own."""

    def __init__(self, config: Qwen2MoeConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        width = config.shared_expert_intermediate_size
        self.shared_expert = GatedMLP(
            config.hidden_size, width, dtype, activation=config.hidden_act
        )
        self.shared_expert_gate = Linear(config.hidden_size, 1, dtype)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        shared = expert_ops.scale_by_sigmoid(self.shared_expert(x), self.shared_expert_gate(x))
        return ops.add(super().forward(x), shared)


def moe_mlp(config: Qwen2MoeConfig, dtype: str, layer: int) -> nn.Module:
    """Make the feed-forward layer of a layer, with experts or without."""
    if not config.has_experts(layer):
        return gated_mlp(config, dtype, layer)
    check_experts(config.num_experts, 1, config.shared_expert_intermediate_size)
    return Qwen2MoE(config, dtype)


def build(config: Qwen2MoeConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Qwen2Attention, moe_mlp)


def special_rule(config: Qwen2MoeConfig, parameter: str) -> ParamRule | None:
    """Return the rule of experts' weights, None for other parameters."""
    return expert_rule(parameter, EXPERT_PARTS, config.num_experts)


SHARED_PARTS = {
    "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
}
FAMILY = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    Qwen2MoeConfig,
    build,
    {**PARTS, **SHARED_PARTS},
    special_rule,
)
