"""GLM-4.5 to 4.7: half of each head rotated, and the experts of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.deepseek import GATED, DeepseekConfig, deepseek_mlp, stacked_experts
from mlc_llm.models.llama import FUSED, attention_shape
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class Glm4MoeConfig(DeepseekConfig):
    """DeepSeek's fields, and whether queries and keys are normalised head by head."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    }

    use_qk_norm: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        has_norms = bool(config.get("use_qk_norm", False))
        return {**super().huggingface_fields(config), "use_qk_norm": has_norms}

    @classmethod
    def choice_of_experts(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return how experts are scored and chosen: always as in DeepSeek-V3."""
        del config
        return {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


class Glm4MoeAttention(nn.Module):
    """Grouped-query attention with biases on q, k and v, and norms of heads in large models."""

    def __init__(self, config: Glm4MoeConfig, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape, self.rope = attention_shape(config, layer), config.rope_of(layer)
        width, size = config.num_attention_heads * config.head_dim, config.head_dim
        self.qkv_proj = Linear(
            config.hidden_size, config.qkv_features, dtype, config.attention_bias
        )
        self.o_proj = Linear(width, config.hidden_size, dtype)
        self.has_norms = config.use_qk_norm
        if self.has_norms:
            self.q_norm = RMSNorm(size, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(size, config.rms_norm_eps, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = self.qkv_proj(x)
        if self.has_norms:
            qkv = norm_heads(qkv, self.q_norm, self.k_norm, self.shape)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


def build(config: Glm4MoeConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Glm4MoeAttention, deepseek_mlp)


def special_rule(config: Glm4MoeConfig, parameter: str) -> ParamRule | None:
    """Return the rule of experts' weights and their bias, None for other parameters."""
    if parameter.endswith("mlp.e_score_correction_bias"):
        return ParamRule((parameter.replace("mlp.e_score", "mlp.gate.e_score"),))
    return stacked_experts(config, parameter)


PARTS = {"self_attn.qkv_proj": FUSED["self_attn.qkv_proj"], **GATED}
# Behind the last layer, the 46th or 92nd, lies one that predicts a token more.
_UNUSED = ("model.layers.46.", "model.layers.92.")
FAMILY = Family(
    "glm4_moe",
    ("Glm4MoeForCausalLM",),
    Glm4MoeConfig,
    build,
    PARTS,
    special_rule,
    unused=_UNUSED,
)
