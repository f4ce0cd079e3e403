"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key/value head for all queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlc_llm.models.base import Family
from mlc_llm.models.gpt2 import GPT2, GPT2Config, tied_head
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import regroup_qkv


@dataclass(frozen=True)
class GPTBigCodeConfig(GPT2Config):
    """GPT-2's fields; `multi_query` says whether keys and values have one head or all."""

    multi_query: bool = True

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        is_multi_query = bool(config.get("multi_query", True))
        fields = super().huggingface_fields(config)
        return {
            **fields,
            "multi_query": is_multi_query,
            "num_key_value_heads": 1 if is_multi_query else fields["num_attention_heads"],
            "hidden_act": config.get("hidden_act") or "gelu_pytorch_tanh",
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> GPTBigCodeConfig:
        """Build from an artifact's `model_config`; MLC LLM's knows multi-query models only."""
        defaults = {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1}
        config = super().from_json({**defaults, **model_config})
        assert isinstance(config, cls)
        return config


def _special(config: GPTBigCodeConfig, parameter: str) -> ParamRule | None:
    if ".c_attn." in parameter and not config.multi_query:
        heads, size = config.num_attention_heads, config.head_dim
        return ParamRule((parameter,), regroup_qkv(heads, (size, size, size)))
    return tied_head(config, parameter)


FAMILY = Family(
    "gpt_bigcode",
    ("GPTBigCodeForCausalLM",),
    GPTBigCodeConfig,
    GPT2,
    special=_special,
    base_prefix="transformer.",
    unused=("lm_head.",),
)
