"""Checkpoints with and without the prefix of their base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.models import llava
from mlc_llm.weights.names import rename_tensors
from mlc_llm.weights.source import EncodedSource


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


def test_releases_of_transformers_spell_parts_differently() -> None:
    spellings = llava.FAMILY.spellings
    wanted = [
        "vision_tower.pre_layrnorm.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ]
    for names in (
        wanted,
        ["vision_tower.vision_model.pre_layrnorm.weight", *wanted[1:]],
        [
            "model.vision_tower.vision_model.pre_layrnorm.weight",
            "model.multi_modal_projector.linear_1.weight",
            "model.language_model.norm.weight",
            "lm_head.weight",
        ],
    ):
        renamed = rename_tensors(Source(*names), wanted, "", spellings)
        assert renamed.names() == wanted
        assert [int(renamed.read(name)[0]) for name in wanted] == [0, 1, 2, 3]
        assert not isinstance(renamed, EncodedSource)


def test_codes_are_found_under_other_names() -> None:
    class Codes(Source):
        def encoding(self, name: str) -> str | None:
            return f"format of {name}"

        def read_encoded(self, name: str) -> Any:
            return f"codes of {name}"

    renamed = rename_tensors(Codes("old.a", "b"), ["new.a", "b"], "", [("old.", "new.")])
    assert isinstance(renamed, EncodedSource)
    assert renamed.encoding("new.a") == "format of old.a"
    assert [renamed.read_encoded(n) for n in ("new.a", "b")] == ["codes of old.a", "codes of b"]
