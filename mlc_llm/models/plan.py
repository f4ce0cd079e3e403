"""How the parameters of a model come from a checkpoint: rules by name, and the resolved plan.

Knows names, shapes and NumPy arrays. Does not know files, TVM or any model family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import TensorSpec

Combine = Callable[[Sequence[NDArray[Any]]], NDArray[Any]]
Quantize = Callable[[NDArray[Any]], tuple[NDArray[Any], ...]]


def concatenate(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Join parts along the output dimension: [q; k; v] and [gate; up]."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)


@dataclass(frozen=True)
class Stack:
    """Joins the parts of each expert as `concatenate` does, and these as (experts, out, in).

    Parts come expert by expert: [gate; up] of the first, [gate; up] of the second.
    """

    num_experts: int

    def __call__(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the experts' parts in one array."""
        rows = concatenate(parts)  # (experts * out, in)
        return rows.reshape(self.num_experts, -1, *rows.shape[1:])


@dataclass(frozen=True)
class ParamRule:
    """Checkpoint tensors (Hugging Face names) and how they become one model parameter.

    whole: the tensor that some checkpoints have in place of all of these, with nothing to combine;
    "" for none.
    """

    sources: tuple[str, ...]
    combine: Combine = concatenate
    whole: str = ""

    def fitting(self, names: Collection[str]) -> ParamRule:
        """Return the rule for a checkpoint that has tensors of these names."""
        has_whole = self.whole in names and not any(name in names for name in self.sources)
        return ParamRule((self.whole,)) if has_whole else self


@dataclass(frozen=True)
class ParamPlan:
    """One parameter of the model before quantization, and what it is stored as.

    shape is that of the unquantized parameter; `store` turns it into arrays that match `outputs`.
    `store_encoded` does so with parts that the checkpoint holds quantized, in the order of the
    rule's sources, without taking them apart; it returns None for encodings it cannot keep.
    """

    name: str
    shape: tuple[int, ...]
    rule: ParamRule
    outputs: tuple[TensorSpec, ...]
    store: Quantize
    store_encoded: Callable[[Sequence[Any]], tuple[NDArray[Any], ...] | None] | None = None
