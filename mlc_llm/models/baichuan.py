"""Baichuan 1 and 2: Llama with one tensor for q, k and v; the larger size has ALiBi, not RoPE."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.llama import FUSED
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import normalize_rows
from mlc_llm.nn.rope import RopeConfig

_VERSION_2_VOCAB = 125696


@dataclass(frozen=True)
class BaichuanConfig(DecoderConfig):
    """A decoder with RoPE or ALiBi; the rows of version 2's output layer have length one.

    has_split_qkv: whether the checkpoint has q, k and v apart, as GGUF files do.
    """

    alibi: bool = False
    normalized_head: bool = False
    has_split_qkv: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        # Only the programs beside the weights say it; their sizes differ in this field.
        alibi = config.get("max_position_embeddings") is None
        longest = config.get("model_max_length") if alibi else config["max_position_embeddings"]
        is_second = "z_loss_weight" in config or config.get("vocab_size") == _VERSION_2_VOCAB
        return {
            **super().huggingface_fields({**config, "max_position_embeddings": longest}),
            "alibi": alibi,
            "normalized_head": is_second,
            "has_split_qkv": bool(config.get("has_split_qkv", False)),
        }

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding, none with ALiBi."""
        return () if self.alibi else super().ropes


class BaichuanAttention(FusedAttention):
    """Attention with RoPE or ALiBi."""

    def __init__(self, config: BaichuanConfig, dtype: str, layer: int) -> None:
        names = ("W_pack", "o_proj")
        super().__init__(config, dtype, layer, names, bias=False, output_bias=False)
        self.shape = dataclasses.replace(self.shape, alibi=config.alibi)


def build(config: BaichuanConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, BaichuanAttention)


def _special(config: BaichuanConfig, parameter: str) -> ParamRule | None:
    if config.has_split_qkv and parameter.endswith("W_pack.weight"):
        prefix = parameter.removesuffix("W_pack.weight")
        return ParamRule(tuple(f"{prefix}{part}_proj.weight" for part in "qkv"))
    is_head = parameter == "lm_head.weight" and config.normalized_head
    return ParamRule((parameter,), normalize_rows) if is_head else None


FAMILY = Family(
    "baichuan",
    ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    BaichuanConfig,
    build,
    {"mlp.gate_up_proj": FUSED["mlp.gate_up_proj"]},
    special=_special,
)
