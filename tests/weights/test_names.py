"""Checkpoints with and without the prefix of their base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.weights.names import rename_tensors


class Source:
    """A checkpoint of made-up tensors; the value of each is its place."""

    def __init__(self, *names: str) -> None:
        self.config: dict[str, Any] = {"a": 1}
        self.is_closed = False
        self._names = names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._names.index(name),)

    def read(self, name: str) -> NDArray[Any]:
        return np.full(1, self._names.index(name))

    def files(self) -> list[Path]:
        return [Path("model.safetensors")]

    def close(self) -> None:
        self.is_closed = True


def test_a_prefix_may_be_there_or_not() -> None:
    wanted = ["embeddings.LayerNorm.weight", "encoder.a.bias"]
    for names in (
        ("embeddings.LayerNorm.weight", "encoder.a.bias", "pooler.weight"),
        ("bert.embeddings.LayerNorm.gamma", "bert.encoder.a.bias", "cls.weight"),
    ):
        source = Source(*names)
        renamed = rename_tensors(source, wanted, "bert.")
        assert renamed.names() == [*wanted, names[2]]
        for place, name in enumerate(renamed.names()):
            assert renamed.shape(name) == (place,) and renamed.read(name).tolist() == [place]
        assert renamed.config == {"a": 1} and renamed.files() == source.files()
        renamed.close()
        assert source.is_closed


def test_a_prefix_may_be_wanted() -> None:
    wanted = ["model.norm.weight", "model.layers.0.bias"]
    for names in (["norm.weight", "layers.0.beta"], wanted):
        assert rename_tensors(Source(*names), wanted, "model.").names() == wanted


def test_without_a_prefix_nothing_is_renamed() -> None:
    source = Source("a.gamma")
    assert rename_tensors(source, ["a.weight"], "") is source
