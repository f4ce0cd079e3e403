"""StableLM 3B and StableLM 2: Llama with layer norms and a share of each head rotated.

The largest one has norms of heads, and attention and feed-forward side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlc_llm.models.base import CausalLM, Family, build_decoder, pre_norm_layer
from mlc_llm.models.cohere import ParallelLayer
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn.norm import LayerNorm


@dataclass(frozen=True)
class StableLMConfig(DecoderConfig):
    """A decoder whose q, k and v may have biases, or norms for each head."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rms_norm_eps": ("layer_norm_eps", "norm_eps"),
        "position_embedding_base": ("rope_theta",),
        "partial_rotary_factor": ("rope_pct",),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-5}

    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        names = ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")
        switches = {name: bool(config.get(name, False)) for name in names}
        return {**super().huggingface_fields(config), **switches}


def attention(config: StableLMConfig, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names, bias = ("qkv_proj", "o_proj"), config.use_qkv_bias
    has_norms = config.qk_layernorm
    return FusedAttention(
        config, dtype, layer, names, bias=bias, output_bias=False, has_head_norms=has_norms
    )


def build(config: StableLMConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    layer = ParallelLayer if config.use_parallel_residual else pre_norm_layer
    return build_decoder(config, dtype, attention, norm=LayerNorm, layer=layer)


def _special(config: StableLMConfig, parameter: str) -> ParamRule | None:
    """Return the rule of norms of heads, which checkpoints keep one by one."""
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        prefix = parameter.removesuffix(f"{part}_norm.weight")
        if prefix != parameter:
            names = (f"{prefix}{part}_layernorm.norms.{head}.weight" for head in range(heads))
            return ParamRule(tuple(names), np.stack)
    return None


FAMILY = Family(
    "stablelm",
    ("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    StableLMConfig,
    build,
    FUSED,
    _special,
)
