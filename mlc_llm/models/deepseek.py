"""DeepSeek's first mixture of experts: Llama with many small experts, and some that all share.

Dense models of that generation (DeepSeek LLM and Coder) are Llama by name as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, Family, build_decoder, gated_mlp
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED
from mlc_llm.models.moe import EXPERT_PARTS, check_experts, expert_rule
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import expert_ops, ops, row_ops
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.moe import Experts, mix_experts
from mlc_llm.nn.ops import Rows

# How later versions choose experts, by the names of `topk_method`; "greedy" is the first one's.
_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class DeepseekConfig(DecoderConfig):
    """Sizes and choice of experts, in all versions; the first `first_k_dense_replace` layers, and
    all that are not multiples of `moe_layer_freq`, have no experts.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"position_embedding_base": ("rope_theta",)}

    attention_bias: bool = False
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    routed_scaling_factor: float = 1.0
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(self.has_experts(layer) for layer in range(self.num_hidden_layers)):
            sizes = (self.moe_intermediate_size, self.n_group, self.topk_group)
            check_experts(self.n_routed_experts, self.num_experts_per_tok, *sizes)
        if self.topk_method not in _METHODS:
            raise UnsupportedModel(
                f"choice of experts {self.topk_method!r} is not supported; "
                f"supported: {', '.join(_METHODS)}"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise UnsupportedModel(f"scores of experts {self.scoring_func!r} are not supported")

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        numbers = ("n_shared_experts", "n_routed_experts", "num_experts_per_tok")
        sizes = ("first_k_dense_replace", "moe_intermediate_size")
        return {
            **super().huggingface_fields(config),
            **{name: config.get(name) or 0 for name in (*numbers, *sizes)},
            "attention_bias": bool(config.get("attention_bias", False)),
            "moe_layer_freq": config.get("moe_layer_freq") or 1,
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
            "routed_scaling_factor": float(config.get("routed_scaling_factor") or 1),
            "n_group": config.get("n_group") or 1,
            "topk_group": config.get("topk_group") or 1,
            **cls.choice_of_experts(config),
        }

    @classmethod
    def choice_of_experts(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return how experts are scored and chosen."""
        return {
            "scoring_func": config.get("scoring_func") or "softmax",
            "topk_method": config.get("topk_method") or "greedy",
        }

    @property
    def routing(self) -> Routing:
        """Return how experts are chosen."""
        is_v3 = self.topk_method == "noaux_tc"
        has_groups = self.topk_method != "greedy"
        return Routing(
            self.n_routed_experts,
            self.num_experts_per_tok,
            scoring="sigmoid" if self.scoring_func == "sigmoid" else "softmax",
            renormalize=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
            num_groups=self.n_group if has_groups else 1,
            top_groups=self.topk_group if has_groups else 1,
            group_score="top2_sum" if is_v3 else "max",
        )

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts; others have a feed-forward layer like Llama's."""
        is_late = layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        return self.n_routed_experts > 0 and is_late


class DeepseekMoE(nn.Module):
    """Routed experts, and those that all tokens share."""

    def __init__(self, config: DeepseekConfig, dtype: str) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        count, self.routing = config.n_routed_experts, config.routing
        self.activation = config.hidden_act
        self.gate = Linear(hidden, count, dtype)
        self.e_score_correction_bias = None
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter((count,), "float32")
        self.moe_gate_up_proj = Experts(count, hidden, 2 * width, dtype)
        self.moe_down_proj = Experts(count, width, hidden, dtype)
        self.shared_experts = None
        if config.n_shared_experts:
            shared = width * config.n_shared_experts
            self.shared_experts = GatedMLP(hidden, shared, dtype, activation=self.activation)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        routes = expert_ops.route(self.gate(x), self.routing, self.e_score_correction_bias)
        mixed = mix_experts(
            x,
            routes,
            self.moe_gate_up_proj,
            self.moe_down_proj,
            lambda y: row_ops.gated(y, self.activation),
        )
        return mixed if self.shared_experts is None else ops.add(mixed, self.shared_experts(x))


def deepseek_mlp(config: DeepseekConfig, dtype: str, layer: int) -> nn.Module:
    """Make the feed-forward layer of a layer, with experts or without."""
    has_experts = config.has_experts(layer)
    return DeepseekMoE(config, dtype) if has_experts else gated_mlp(config, dtype, layer)


def _attention(config: DeepseekConfig, dtype: str, layer: int) -> nn.Module:
    bias = config.attention_bias
    names = ("wqkv_pack", "o_proj")
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=bias)


def build(config: DeepseekConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, _attention, deepseek_mlp)


def stacked_experts(config: DeepseekConfig, parameter: str) -> ParamRule | None:
    """Return the rule of experts' weights, None for other parameters."""
    return expert_rule(parameter, EXPERT_PARTS, config.n_routed_experts)


GATED = {
    "mlp.gate_up_proj": FUSED["mlp.gate_up_proj"],
    "mlp.shared_experts.gate_up_proj": (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ),
}
FAMILY = Family(
    "deepseek",
    ("DeepseekForCausalLM",),
    DeepseekConfig,
    build,
    {"self_attn.wqkv_pack": FUSED["self_attn.qkv_proj"], **GATED},
    stacked_experts,
)
