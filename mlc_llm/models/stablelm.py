"""StableLM 3B and StableLM 2: Llama with layer norms and a share of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED
from mlc_llm.nn.norm import LayerNorm


@dataclass(frozen=True)
class StableLMConfig(DecoderConfig):
    """A decoder whose q, k and v may have biases."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rms_norm_eps": ("layer_norm_eps", "norm_eps"),
        "position_embedding_base": ("rope_theta",),
        "partial_rotary_factor": ("rope_pct",),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-5}

    use_qkv_bias: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        for name in ("qk_layernorm", "use_parallel_residual"):
            if config.get(name):
                raise UnsupportedModel(f"configuration: {name}=True is not supported")
        bias = bool(config.get("use_qkv_bias", False))
        return {**super().huggingface_fields(config), "use_qkv_bias": bias}


def attention(config: StableLMConfig, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names, bias = ("qkv_proj", "o_proj"), config.use_qkv_bias
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=False)


def build(config: StableLMConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, norm=LayerNorm)


FAMILY = Family(
    "stablelm",
    ("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    StableLMConfig,
    build,
    FUSED,
)
