"""Checkpoints whose names are not quite those of a plan: with or without the base model's prefix.

transformers saves `bert.encoder...` for a model with a head and `encoder...` for one without, and
its releases spell the parts of a model differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mlc_llm.quantization.encoded import Encoded
from mlc_llm.weights.source import EncodedSource, WeightSource

# What the parameters of norms are called in checkpoints that were once TensorFlow's.
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}


class RenamedSource:
    """A checkpoint under other names; satisfies WeightSource and owns what it wraps."""

    def __init__(self, source: WeightSource, stored_names: dict[str, str]) -> None:
        """Take a checkpoint and the name it has for each of ours."""
        self.config = source.config
        self._source = source
        self._stored = stored_names

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        return self._source.shape(self._stored.get(name, name))

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor, see WeightSource."""
        return self._source.read(self._stored.get(name, name))

    def files(self) -> list[Path]:
        """Return the files the tensors lie in."""
        return self._source.files()

    def close(self) -> None:
        """Close the checkpoint."""
        self._source.close()


class RenamedEncodedSource(RenamedSource):
    """The same of a checkpoint that hands out quantized tensors as they are."""

    def __init__(self, source: EncodedSource, stored_names: dict[str, str]) -> None:
        super().__init__(source, stored_names)
        self._encoded = source

    def encoding(self, name: str) -> str | None:
        """Return the format that a tensor's codes fit, see EncodedSource."""
        return self._encoded.encoding(self._stored.get(name, name))

    def read_encoded(self, name: str) -> Encoded | None:
        """Return a tensor as it is stored, see EncodedSource."""
        return self._encoded.read_encoded(self._stored.get(name, name))


def rename_tensors(
    source: WeightSource,
    wanted: Iterable[str],
    prefix: str,
    spellings: Sequence[tuple[str, str]] = (),
) -> WeightSource:
    """Return a checkpoint whose tensors have the wanted names, where only `prefix` differs.

    prefix: what the base model's names may begin with, such as "bert."; "" for nothing. spellings:
    beginnings of names in some checkpoints and what they are in the wanted ones, applied in order.
    """
    if not prefix and not spellings:
        return source

    def plain(name: str) -> str:
        for ending, current in _OLD_ENDINGS.items():
            if prefix and name.endswith(ending):
                name = name[: -len(ending)] + current
        for stored, current in spellings:
            if name.startswith(stored):
                name = current + name.removeprefix(stored)
        return name.removeprefix(prefix)

    wanted_of = {plain(name): name for name in wanted}
    stored = {wanted_of.get(plain(n), n): n for n in source.names()}
    if isinstance(source, EncodedSource):
        return RenamedEncodedSource(source, stored)
    return RenamedSource(source, stored)
