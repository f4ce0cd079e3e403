"""Checkpoints in which the experts of a layer are one tensor, read as if each had its own.

transformers 5 keeps experts so in memory and names them as older releases did when it saves;
programs that save tensors as they are in memory write `mlp.experts.gate_up_proj` (experts,
2 * intermediate, hidden) and `mlp.experts.down_proj` (experts, hidden, intermediate).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mlc_llm.errors import ParameterMismatch
from mlc_llm.weights.source import WeightSource

_EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_GATE = re.compile(r"(.+)\.block_sparse_moe\.gate\.weight")
# Module of one expert -> the stacked tensor, and which half of its rows, None for all.
_PARTS: dict[str, tuple[str, int | None]] = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", None)),
}


@dataclass(frozen=True)
class _Part:
    """A part of a stored tensor: an expert's, or all of it; a half of the rows, or all."""

    stored: str
    expert: int | None = None
    half: int | None = None


class StackedExperts:
    """A checkpoint whose stacked tensors are handed out in parts; satisfies WeightSource."""

    def __init__(self, source: WeightSource, parts: dict[str, _Part]) -> None:
        """Take a checkpoint, which is owned from now on, and where the parts named lie in it."""
        self.config = source.config
        self._source, self._parts = source, parts

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        stacked = {part.stored for part in self._parts.values()}
        return [name for name in self._source.names() if name not in stacked] + list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown, or no part is there."""
        part = self._parts.get(name)
        shape = self._source.shape(name if part is None else part.stored)
        if part is None or part.expert is None:
            return shape
        if len(shape) != 3 or part.expert >= shape[0] or (part.half is not None and shape[1] % 2):
            raise ParameterMismatch(
                f"{part.stored} is {list(shape)} and has no {name}; "
                "check that config.json and weights belong together"
            )
        return (shape[1] if part.half is None else shape[1] // 2, shape[2])

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor, see WeightSource."""
        part = self._parts.get(name)
        if part is None:
            return self._source.read(name)
        if part.expert is None:
            return self._source.read(part.stored)
        rows = self.shape(name)[0]
        start = rows * (part.half or 0)
        expert: NDArray[Any] = self._source.read(part.stored)[part.expert, start : start + rows]
        return expert

    def files(self) -> list[Path]:
        """Return the files the tensors lie in."""
        return self._source.files()

    def close(self) -> None:
        """Close the checkpoint."""
        self._source.close()


def split_experts(source: WeightSource, wanted: Iterable[str]) -> WeightSource:
    """Return a checkpoint that has the wanted tensors of single experts, where it stacks them."""
    found = set(source.names())
    parts = {}
    for name in wanted:
        part = None if name in found else _find_part(name)
        if part is not None and part.stored in found:
            parts[name] = part
    return StackedExperts(source, parts) if parts else source


def _find_part(name: str) -> _Part | None:
    if gate := _GATE.fullmatch(name):
        return _Part(f"{gate[1]}.mlp.gate.weight")
    expert = _EXPERT.fullmatch(name)
    if expert is None or expert[3] not in _PARTS:
        return None
    stacked, half = _PARTS[expert[3]]
    return _Part(f"{expert[1]}.mlp.experts.{stacked}", int(expert[2]), half)
