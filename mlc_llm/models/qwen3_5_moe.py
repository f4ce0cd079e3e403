"""Qwen3.5-MoE and Qwen3-Next: the layers of Qwen3.5 with the experts of Qwen2-MoE."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.models import qwen3_5
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.plan import Combine, ParamRule
from mlc_llm.models.qwen2 import PARTS
from mlc_llm.models.qwen2_moe import SHARED_PARTS, Qwen2MoeConfig, moe_mlp, special_rule
from mlc_llm.models.qwen3_5 import HybridLM, Qwen35Config, attention, decoder_layer


@dataclass(frozen=True)
class Qwen35MoeConfig(Qwen35Config, Qwen2MoeConfig):
    """The fields of both; weights of experts sum to 1, where nothing else is said.

    has_split_qkvz: whether q, k and v lie apart from z in linear attention of Qwen3-Next's
    checkpoints, as in GGUF files.
    """

    layer_types: list[str] = dataclasses.field(default_factory=list)
    has_split_qkvz: bool = False

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        # All layers may have experts, and then nothing is said of others.
        usual = {"norm_topk_prob": True, "intermediate_size": config.get("moe_intermediate_size")}
        given = {name: value for name, value in config.items() if value is not None}
        fields = super().huggingface_fields({**usual, **given})
        return {**fields, "has_split_qkvz": bool(config.get("has_split_qkvz", False))}


def build(config: Qwen35MoeConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(
        config, dtype, attention, moe_mlp, layer=decoder_layer, language_model=HybridLM
    )


def _rule_for(config: Qwen35MoeConfig, parameter: str) -> ParamRule:
    experts = special_rule(config, parameter.replace("model.", config.tensor_prefix, 1))
    return experts or qwen3_5.rule_for(config, parameter, {**PARTS, **SHARED_PARTS})


def _take_rows(sizes: Sequence[int], taken: Sequence[int], num_groups: int) -> Combine:
    """Take parts of the rows of a matrix, which lie group by group, `sizes` rows of each part.

    taken: which parts, and in this order all groups of the first, then of the second.
    """
    ends = np.cumsum([0, *sizes])

    def combine(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        groups = parts[0].reshape(num_groups, int(ends[-1]), -1)
        rows = [groups[:, ends[part] : ends[part + 1]] for part in taken]
        return np.concatenate([part.reshape(-1, groups.shape[-1]) for part in rows])

    return combine


def _next_rule(config: Qwen35MoeConfig, parameter: str) -> ParamRule:
    """Return the rule of Qwen3-Next, which keeps inputs of linear attention by key heads."""
    delta = config.delta_shape
    num_groups, group = delta.num_key_heads, delta.num_heads // delta.num_key_heads
    values = group * delta.value_dim
    qkvz, ba = (delta.key_dim, delta.key_dim, values, values), (group, group)
    rows = {
        "in_proj_qkv": ("in_proj_qkvz", qkvz, (0, 1, 2)),
        "in_proj_z": ("in_proj_qkvz", qkvz, (3,)),
        "in_proj_b": ("in_proj_ba", ba, (0,)),
        "in_proj_a": ("in_proj_ba", ba, (1,)),
    }
    path, _, module = parameter.removesuffix(".weight").rpartition(".")
    if module not in rows or (config.has_split_qkvz and module in ("in_proj_qkv", "in_proj_z")):
        return _rule_for(config, parameter)
    stored, sizes, taken = rows[module]
    return ParamRule((f"{path}.{stored}.weight",), _take_rows(sizes, taken, num_groups))


FAMILY = Family(
    "qwen3_5_moe",
    ("Qwen3_5MoeForConditionalGeneration",),
    Qwen35MoeConfig,
    build,
    special=_rule_for,
    unused=qwen3_5.UNUSED,
)
TEXT = dataclasses.replace(
    FAMILY,
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextForCausalLM"),
)
NEXT = dataclasses.replace(
    FAMILY, name="qwen3_next", architectures=("Qwen3NextForCausalLM",), special=_next_rule
)
