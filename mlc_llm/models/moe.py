"""What families with experts share: the check of their sizes, and where their weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile
from mlc_llm.models.plan import ParamRule, Stack

# Modules of stacked experts under MLC LLM's names -> the parts of one in most checkpoints.
EXPERT_PARTS = {"moe_gate_up_proj": ("gate_proj", "up_proj"), "moe_down_proj": ("down_proj",)}
# The same -> the tensor of all experts that some checkpoints hold in place of these parts.
_STACKED = {"moe_gate_up_proj": "gate_up_proj", "moe_down_proj": "down_proj"}


def check_experts(num_experts: object, per_token: object, *sizes: object) -> None:
    """Check the number of experts, how many a token has, and their sizes. Raises CorruptFile."""
    for value in (num_experts, per_token, *sizes):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CorruptFile(
                f"model configuration: {value!r} stands for a number of experts or their size; "
                "it must be at least 1"
            )
    assert isinstance(num_experts, int) and isinstance(per_token, int)
    if per_token > num_experts:
        raise CorruptFile(
            f"model configuration: a token has {per_token} experts, the model {num_experts}"
        )


def outputs_first(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return weights (experts, in, out), the only part, as (experts, out, in)."""
    return np.ascontiguousarray(parts[0].swapaxes(1, 2))


def expert_rule(
    parameter: str,
    modules: Mapping[str, tuple[str, ...]],
    num_experts: int,
    experts: str = "experts",
) -> ParamRule | None:
    """Return the rule of a parameter of experts that checkpoints hold one by one; None for others.

    The parameter is a weight (experts, out, in) or bias (experts, out). modules: ends of the paths
    of such modules -> modules of one expert that are joined along `out`. experts: what stands in a
    checkpoint in place of these ends, before the number of an expert.
    """
    path, _, leaf = parameter.rpartition(".")
    for module, parts in modules.items():
        if path.endswith(module):
            prefix = path.removesuffix(module) + experts
            names = [f"{prefix}.{e}.{part}.{leaf}" for e in range(num_experts) for part in parts]
            has_whole = module in _STACKED and leaf == "weight"
            whole = f"{prefix}.{_STACKED[module]}" if has_whole else ""
            return ParamRule(tuple(names), Stack(num_experts), whole)
    return None
