"""InternLM2 and 2.5: Llama under other names; checkpoints keep q, k and v of a KV head together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import LlamaConfig
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import regroup_qkv
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.mlp import GatedMLP

_NAMES = DecoderNames(
    lm_head="output",
    embed_tokens="tok_embeddings",
    attention="attention",
    mlp="feed_forward",
    attention_norm="attention_norm",
    mlp_norm="ffn_norm",
)


@dataclass(frozen=True)
class InternLM2Config(LlamaConfig):
    """Llama's fields; `bias` is that of attention.

    has_split_qkv: whether the checkpoint has q, k and v apart, as GGUF files do.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention_bias": ("bias",)}

    has_split_qkv: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        split = bool(config.get("has_split_qkv", False))
        return {**super().huggingface_fields(config), "has_split_qkv": split}


def attention(config: InternLM2Config, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names, bias = ("wqkv", "wo"), config.attention_bias
    return FusedAttention(config, dtype, layer, names, bias=bias, output_bias=bias)


def mlp(config: InternLM2Config, dtype: str, layer: int) -> nn.Module:
    """Make a feed-forward layer."""
    del layer
    names = ("gate_up_proj", "w2")
    return GatedMLP(
        config.hidden_size, config.intermediate_size, dtype, False, config.hidden_act, names
    )


def build(config: InternLM2Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, mlp, names=_NAMES)


def _special(config: InternLM2Config, parameter: str) -> ParamRule | None:
    if ".wqkv." not in parameter:
        return None
    if config.has_split_qkv:
        return ParamRule(tuple(parameter.replace("wqkv", f"w{part}") for part in "qkv"))
    size, kv_heads = config.head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // kv_heads * size
    return ParamRule((parameter,), regroup_qkv(kv_heads, (queries, size, size)))


FAMILY = Family(
    "internlm2",
    ("InternLM2ForCausalLM",),
    InternLM2Config,
    build,
    {"feed_forward.gate_up_proj": ("feed_forward.w1", "feed_forward.w3")},
    special=_special,
)
