"""DeepSeek V2, V3 and R1: latent attention, and experts from the best groups of experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.artifact import KVCacheLayout
from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.kernels.cpu.latent import LatentShape
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import (
    PAGE_SIZE,
    CausalLM,
    DecoderLM,
    Family,
    build_decoder,
    gated_mlp,
)
from mlc_llm.models.config import DecoderConfig, take_int
from mlc_llm.models.llama import FUSED
from mlc_llm.models.moe import check_experts, expert_rule
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import expert_ops, ops, row_ops
from mlc_llm.nn.latent import LatentAttention
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.moe import Experts, mix_experts
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig, scaling_kind

_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
# How V2 and V3 choose experts, by the names of `topk_method`.
_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class DeepseekV2Config(DecoderConfig):
    """Sizes of latent attention and of experts; the first `first_k_dense_replace` layers, and all
    that are not multiples of `moe_layer_freq`, have no experts.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"position_embedding_base": ("rope_theta",)}

    attention_bias: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
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
        # What is cached has one head; its size and theirs differ.
        fields = super().huggingface_fields({**config, "head_dim": None})
        numbers = ("n_shared_experts", "n_routed_experts", "num_experts_per_tok")
        sizes = ("first_k_dense_replace", "moe_intermediate_size")
        return {
            **fields,
            **{name: take_int(config, name) for name in _SIZES},
            **{name: config.get(name) or 0 for name in (*numbers, *sizes)},
            "head_dim": take_int(config, "qk_rope_head_dim"),
            "q_lora_rank": config.get("q_lora_rank"),
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

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> DeepseekV2Config:
        """Build from an artifact's `model_config`, ours or MLC LLM's."""
        return super().from_json({**model_config, "head_dim": model_config["qk_rope_head_dim"]})

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding, of a part that stands apart in each head."""
        context = self.context_window_size
        base, dim = self.position_embedding_base, self.qk_rope_head_dim
        return (RopeConfig(base, dim, self.rope_scaling, context, is_interleaved=True),)

    @property
    def latent(self) -> LatentShape:
        """Return the sizes of latent attention."""
        return LatentShape(
            num_heads=self.num_attention_heads,
            rank=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
            nope_dim=self.qk_nope_head_dim,
            value_dim=self.v_head_dim,
        )

    @property
    def attention_scale(self) -> float:
        """Return what scores are multiplied with; YaRN sharpens them."""
        scale = float(self.latent.query_dim**-0.5)
        scaling = self.rope_scaling or {}
        factor, weight = float(scaling.get("factor") or 1), scaling.get("mscale_all_dim")
        if scaling_kind(scaling) != "yarn" or not weight or factor <= 1:
            return scale
        return scale * (0.1 * float(weight) * math.log(factor) + 1) ** 2

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


@dataclass(frozen=True)
class DeepseekV3Config(DeepseekV2Config):
    """V3's defaults: sigmoid scores, and a bias for the choice."""

    @classmethod
    def choice_of_experts(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return how experts are scored and chosen."""
        return {
            "scoring_func": config.get("scoring_func") or "sigmoid",
            "topk_method": config.get("topk_method") or "noaux_tc",
        }


class DeepseekLM(DecoderLM):
    """The usual decoder with one small key/value head."""

    def kv_layout(self) -> KVCacheLayout:
        """Return the shape of the KV pages that `forward` works on."""
        config = self.config
        assert isinstance(config, DeepseekV2Config)
        return KVCacheLayout(
            num_layers=config.num_hidden_layers,
            num_key_value_heads=1,
            head_dim=config.latent.head_dim,
            page_size=PAGE_SIZE,
            dtype=config.kv_dtype(self.dtype_name),
        )


class DeepseekMoE(nn.Module):
    """Routed experts, and those that all tokens share."""

    def __init__(self, config: DeepseekV2Config, dtype: str) -> None:
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


def _attention(config: DeepseekV2Config, dtype: str, layer: int) -> nn.Module:
    latent = config.latent
    attention = AttentionShape(
        num_heads=latent.num_heads,
        num_kv_heads=1,
        head_dim=latent.head_dim,
        page_size=PAGE_SIZE,
        kv_dtype="float16",
        scale=config.attention_scale,
        window=config.window_of(layer),
        sinks=max(config.attention_sink_size, 0),
    )
    rank, eps = config.q_lora_rank or 0, config.rms_norm_eps
    hidden, bias = config.hidden_size, config.attention_bias
    return LatentAttention(latent, attention, hidden, rank, eps, dtype, bias)


def _mlp(config: DeepseekV2Config, dtype: str, layer: int) -> nn.Module:
    has_experts = config.has_experts(layer)
    return DeepseekMoE(config, dtype) if has_experts else gated_mlp(config, dtype, layer)


def build(config: DeepseekV2Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, _attention, _mlp, language_model=DeepseekLM)


def _split_heads(config: DeepseekV2Config, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shape = config.latent
    rows: NDArray[Any] = parts[0]
    return rows.reshape(shape.num_heads, shape.nope_dim + shape.value_dim, shape.rank)


def _special(config: DeepseekV2Config, parameter: str) -> ParamRule | None:
    nope = config.qk_nope_head_dim
    if parameter.endswith(".w_uk"):
        source = (parameter.removesuffix("w_uk") + "kv_b_proj.weight",)
        return ParamRule(
            source,
            lambda parts: np.ascontiguousarray(
                _split_heads(config, parts)[:, :nope].swapaxes(1, 2)
            ),
        )
    if parameter.endswith(".w_uv"):
        source = (parameter.removesuffix("w_uv") + "kv_b_proj.weight",)
        return ParamRule(source, lambda parts: _split_heads(config, parts)[:, nope:])
    if parameter.endswith("mlp.e_score_correction_bias"):
        prefix = parameter.removesuffix("e_score_correction_bias")
        return ParamRule((f"{prefix}gate.e_score_correction_bias",))
    path = parameter.removesuffix(".weight")
    for suffix, parts in _EXPERTS.items():
        if path.endswith(suffix):
            experts = f"{path.removesuffix(suffix)}experts"
            return expert_rule(experts, parts, config.n_routed_experts)
    return None


_EXPERTS = {"moe_gate_up_proj": ("gate_proj", "up_proj"), "moe_down_proj": ("down_proj",)}
_PARTS = {
    "mlp.gate_up_proj": FUSED["mlp.gate_up_proj"],
    "mlp.shared_experts.gate_up_proj": (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ),
}
# MLC LLM's artifacts hold both halves of it, `w_uk` and `w_uv`, and the whole beside them.
_WHOLE = ("self_attn.kv_b_proj",)
FAMILY = Family(
    "deepseek_v2",
    ("DeepseekV2ForCausalLM",),
    DeepseekV2Config,
    build,
    _PARTS,
    _special,
    unused_modules=_WHOLE,
)
V3 = dataclasses.replace(
    FAMILY,
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config=DeepseekV3Config,
)
