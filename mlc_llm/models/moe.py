"""What families with experts share: the check of their sizes, and where their weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile
from mlc_llm.models.plan import ParamRule, Stack


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
    experts: str, parts: tuple[str, ...], num_experts: int, leaf: str = "weight"
) -> ParamRule:
    """Return the rule of a weight (experts, out, in) that checkpoints hold expert by expert.

    experts: module path of the experts; parts: modules of one that are joined along `out`.
    leaf: "weight", or "bias" for (experts, out).
    """
    names = [f"{experts}.{e}.{part}.{leaf}" for e in range(num_experts) for part in parts]
    return ParamRule(tuple(names), Stack(num_experts))
