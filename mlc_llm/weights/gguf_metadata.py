"""Numbers and texts of a GGUF file's metadata, checked. Does not know what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.weights.gguf_file import GGUFFile


class MetadataReader:
    """Metadata of one architecture, with the checks every number needs."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        """Take a file, and the name that its keys begin with."""
        self.path, self._file, self._arch = file.path, file, arch

    def number(self, key: str, kind: str, default: Any) -> Any:
        """Return a number of a kind that tables of architectures name."""
        if kind == "flag":
            return self._file.get(f"{self._arch}.{key}", bool, default)
        return self.count(key, default) if kind == "count" else self.real(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number, which must be there and above 0 unless there is a default."""
        value = self._file.get(f"{self._arch}.{key}", (int, list), default)
        if isinstance(value, list):
            return self._same_in_all_layers(key, value)
        if value is None or value < 0 or (value == 0 and default is None):
            raise CorruptFile(f"{self.path}: metadata {self._arch}.{key} is {value}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """Return a number from 0 on, which must be there unless there is a default."""
        value = self._file.get(f"{self._arch}.{key}", (float, int), default)
        if value is None or not 0 <= value < 1e30:
            raise CorruptFile(f"{self.path}: metadata {self._arch}.{key} is {value}")
        # Stored as float32: the shortest decimal number that means the same is what was meant.
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        return str(self._file.get(f"{self._arch}.{key}", str, default))

    def refuse_unless(self, key: str, expected: int, feature: str) -> None:
        """Raise UnsupportedModel, which names a feature, unless a number is as expected."""
        found = self.count(key, expected)
        if found != expected:
            raise UnsupportedModel(
                f"{self.path} has {feature} ({self._arch}.{key} is {found}), which is not supported"
            )

    def num_layers(self) -> int:
        """Return the number of layers, without those behind them that predict further tokens."""
        return self.further_layers().start

    def further_layers(self) -> range:
        """Return the numbers of the layers that predict further tokens."""
        count, others = self.count("block_count"), self.count("nextn_predict_layers", 0)
        if others >= count:
            raise CorruptFile(f"{self.path}: {others} of {count} layers predict further tokens")
        return range(count - others, count)

    def _same_in_all_layers(self, key: str, values: list[Any]) -> int:
        # Values may be lists themselves, or of kinds that cannot be compared.
        if not values or values.count(values[0]) != len(values) or type(values[0]) is not int:
            raise UnsupportedModel(
                f"{self.path}: {self._arch}.{key} differs from layer to layer, "
                "which is not supported"
            )
        if values[0] <= 0:
            raise CorruptFile(f"{self.path}: metadata {self._arch}.{key} is {values[0]}")
        return int(values[0])
