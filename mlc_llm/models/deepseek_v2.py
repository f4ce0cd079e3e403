"""DeepSeek V2, V3 and R1: latent attention, and experts from the best groups of experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.artifact import KVCacheLayout
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.kernels.cpu.latent import LatentShape
from mlc_llm.models.base import PAGE_SIZE, CausalLM, DecoderLM, Family, build_decoder
from mlc_llm.models.config import take_int
from mlc_llm.models.deepseek import GATED, DeepseekConfig, deepseek_mlp, stacked_experts
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn.latent import LatentAttention
from mlc_llm.nn.rope import RopeConfig, scaling_kind

_FORMS = ("is_from_gguf", "has_split_kv_b")
_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class DeepseekV2Config(DeepseekConfig):
    """Sizes of latent attention, beside those of experts.

    is_from_gguf: whether the checkpoint has the names of GGUF files, and has_split_kv_b, whether
    keys and values of the latent lie apart in it.
    """

    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    is_from_gguf: bool = False
    has_split_kv_b: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        # What is cached has one head; its size and theirs differ.
        fields = super().huggingface_fields({**config, "head_dim": None})
        return {
            **fields,
            **{name: take_int(config, name) for name in _SIZES},
            "head_dim": take_int(config, "qk_rope_head_dim"),
            "q_lora_rank": config.get("q_lora_rank"),
            **{name: bool(config.get(name, False)) for name in _FORMS},
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


def build(config: DeepseekV2Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, _attention, deepseek_mlp, language_model=DeepseekLM)


def _split_heads(config: DeepseekV2Config, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shape = config.latent
    rows: NDArray[Any] = parts[0]
    return rows.reshape(shape.num_heads, shape.nope_dim + shape.value_dim, shape.rank)


def _special(config: DeepseekV2Config, parameter: str) -> ParamRule | None:
    nope = config.qk_nope_head_dim
    if config.has_split_kv_b and parameter.endswith((".w_uk", ".w_uv")):
        prefix, _, name = parameter.rpartition("w_u")
        return ParamRule((f"{prefix}{name}_b_proj.weight",))
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
        mark = "." if config.is_from_gguf else "_"
        return ParamRule((f"{prefix}gate.e_score_correction{mark}bias",))
    return stacked_experts(config, parameter)


# MLC LLM's artifacts hold both halves of it, `w_uk` and `w_uv`, and the whole beside them.
_WHOLE = ("self_attn.kv_b_proj",)
FAMILY = Family(
    "deepseek_v2",
    ("DeepseekV2ForCausalLM",),
    DeepseekV2Config,
    build,
    GATED,
    _special,
    unused_modules=_WHOLE,
)
V3 = dataclasses.replace(
    FAMILY,
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config=DeepseekV3Config,
)
