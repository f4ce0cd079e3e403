"""A quantized Hugging Face checkpoint read as the plain one it stands for, tensor by tensor.

Each weight gets the name and shape it has in the unquantized model and is decoded when it is read.
Formats are described in packed_formats.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.quantization.encoded import Encoded
from mlc_llm.weights.huggingface import HuggingFaceSource
from mlc_llm.weights.packed_formats import PackedFormat


@dataclass(frozen=True)
class _Weight:
    shape: tuple[int, ...]
    parts: dict[str, str]


class DequantizedSource:
    """A quantized checkpoint; satisfies EncodedSource. `stored` has its tensors as they are."""

    def __init__(self, stored: HuggingFaceSource, packed: PackedFormat) -> None:
        """Find the weights that are quantized. Raises ParameterMismatch where parts do not fit."""
        self.stored = stored
        self.config: dict[str, Any] = stored.config
        self._format = packed
        self._weights: dict[str, _Weight] = {}
        parts: set[str] = set()
        names = stored.names()
        known = set(names)
        for name in names:
            module, found = _split(name, packed)
            if found != packed.marker or not self._is_packed(name):
                continue
            weight = self._collect(module, known)
            self._weights[module[:-1] + packed.weight_name] = weight
            parts.update(weight.parts.values())
        self._names = [
            name
            for name in names
            if name not in parts and _split(name, packed)[1] not in packed.unused
        ]
        self._names += self._weights
        if twice := sorted(known.difference(parts) & set(self._weights)):
            raise ParameterMismatch(
                f"{', '.join(twice[:5])} is there both plain and quantized by {packed.method}; "
                "fetch the checkpoint again"
            )

    def names(self) -> list[str]:
        """Return the names of all tensors of the plain model."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in the plain model. Raises ParameterMismatch if unknown."""
        weight = self._weights.get(name)
        return self.stored.shape(name) if weight is None else weight.shape

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor, decoded to float32 where it is quantized."""
        weight = self._weights.get(name)
        if weight is None:
            return self.stored.read(name)
        parts = {part: self.stored.read_stored(stored) for part, stored in weight.parts.items()}
        try:
            return self._format.decode(parts)
        except CorruptFile as error:
            raise CorruptFile(f"{name}: {error}") from None

    def encoding(self, name: str) -> str | None:
        """Return None: no method stores codes that fit a `GroupFormat`."""
        del name
        return None

    def read_encoded(self, name: str) -> Encoded | None:
        """Return a tensor as it is quantized, where a scheme can keep it so; None for others."""
        weight = self._weights.get(name)
        if weight is None:
            return None
        return self._format.encode(
            {part: self.stored.read_stored(stored) for part, stored in weight.parts.items()}
        )

    def files(self) -> list[Path]:
        """Return the files in use."""
        return self.stored.files()

    def close(self) -> None:
        """Forget the headers; mappings live as long as the arrays handed out."""
        self._weights, self._names = {}, []
        self.stored.close()

    def _is_packed(self, name: str) -> bool:
        packed = self._format
        # A part called `weight` is quantized or not; its dtype tells.
        return packed.marker != "weight" or self.stored.dtype(name) in packed.parts["weight"]

    def _collect(self, module: str, known: set[str]) -> _Weight:
        packed = self._format
        wanted = [part for part in packed.parts if part not in packed.optional]
        missing = [module + part for part in wanted if module + part not in known]
        if missing:
            raise ParameterMismatch(
                f"{module + packed.marker} is quantized by {packed.method}, but "
                f"{', '.join(missing)} is not there; fetch the checkpoint again"
            )
        parts = {part: module + part for part in packed.parts if module + part in known}
        for part, name in parts.items():
            if (dtype := self.stored.dtype(name)) not in packed.parts[part]:
                raise UnsupportedModel(
                    f"{name} is {dtype}; {packed.method} has {', '.join(packed.parts[part])} there"
                )
        shapes = {part: self.stored.shape(name) for part, name in parts.items()}
        try:
            shape = packed.find_shape(shapes)
        except ValueError:  # another number of dimensions
            shape = None
        if shape is None:
            found = ", ".join(f"{part} {list(extents)}" for part, extents in shapes.items())
            raise ParameterMismatch(
                f"the tensors of {module[:-1]} do not fit each other or quantization_config "
                f"({packed.method}): {found}"
            )
        return _Weight(shape, parts)


def _split(name: str, packed: PackedFormat) -> tuple[str, str]:
    """Return the module with the character that joins it to its part, and the part."""
    separator = "." if packed.weight_name else "_"
    module, _, part = name.rpartition(separator)
    return (module + separator, part) if module else ("", name)
