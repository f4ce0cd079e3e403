"""Phi-3, Phi-3.5 and Phi-4: Llama under other names, with RoPE factors for long texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.rules import renamed
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.rope import scaling_kind

_NAMES = DecoderNames(
    model="transformer",
    embed_tokens="embd",
    layers="h",
    attention="mixer",
    attention_norm="ln",
)


@dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """A decoder that remembers the lengths it was made and first trained for.

    The factors of its RoPE scaling follow from both, whatever the context window of a library.
    """

    max_position_embeddings: int = 0
    original_max_position_embeddings: int = 0

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        fields = super().huggingface_fields(config)
        longest = fields["context_window_size"]
        trained = config.get("original_max_position_embeddings") or longest
        return {
            **fields,
            "sliding_window_size": config.get("sliding_window") or -1,
            "max_position_embeddings": longest,
            "original_max_position_embeddings": trained,
            "rope_scaling": _with_lengths(fields["rope_scaling"], longest, trained),
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> Phi3Config:
        """Build from an artifact's `model_config`; MLC LLM's keeps lengths beside the scaling."""
        longest = model_config.get("max_position_embeddings") or 0
        trained = model_config.get("original_max_position_embeddings") or longest
        scaling = _with_lengths(model_config.get("rope_scaling") or None, longest, trained)
        return super().from_json({**model_config, "rope_scaling": scaling})


def _with_lengths(
    scaling: dict[str, Any] | None, longest: int, trained: int
) -> dict[str, Any] | None:
    if scaling_kind(scaling) not in ("longrope", "su") or not trained:
        return scaling
    return {
        "factor": longest / trained,
        "original_max_position_embeddings": trained,
        **{name: value for name, value in (scaling or {}).items() if value is not None},
    }


def attention(config: Phi3Config, dtype: str, layer: int) -> FusedAttention:
    """Make the attention of a layer."""
    names = ("qkv_proj", "out_proj")
    return FusedAttention(config, dtype, layer, names, bias=False, output_bias=False)


def build(config: Phi3Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, names=_NAMES)


FAMILY = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    Phi3Config,
    build,
    special=renamed(
        ("transformer.embd.", "model.embed_tokens."),
        ("transformer.h.", "model.layers."),
        ("transformer.", "model."),
        (".ln.", ".input_layernorm."),
        (".mixer.out_proj.", ".self_attn.o_proj."),
        (".mixer.", ".self_attn."),
    ),
)
