"""StarCoder2: layer norms, biases and a plain feed-forward layer around Llama's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm


@dataclass(frozen=True)
class StarCoder2Config(DecoderConfig):
    """A decoder with biases everywhere or nowhere."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"rms_norm_eps": ("norm_epsilon",)}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }

    use_bias: bool = True

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {
            **super().huggingface_fields(config),
            "sliding_window_size": config.get("sliding_window") or -1,
            "use_bias": bool(config.get("use_bias", True)),
        }


def attention(config: StarCoder2Config, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names, bias = ("wqkv_pack", "o_proj"), config.use_bias
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=bias)


def mlp(config: StarCoder2Config, dtype: str, layer: int) -> nn.Module:
    """Make a feed-forward layer."""
    del layer
    width, names = config.intermediate_size, ("c_fc", "c_proj")
    return MLP(config.hidden_size, width, dtype, config.hidden_act, names, config.use_bias)


def build(config: StarCoder2Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, mlp, norm=LayerNorm)


PARTS = {"self_attn.wqkv_pack": FUSED["self_attn.qkv_proj"]}
FAMILY = Family("starcoder2", ("Starcoder2ForCausalLM",), StarCoder2Config, build, PARTS)
