"""Hugging Face directories with safetensors or PyTorch files, single or sharded.

Headers are checked against the file size before anything is read; tensors are mapped one by one,
so that no more of a file is resident than the tensors in use. Does not know models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, UnsupportedModel
from mlc_llm.weights.safetensors_file import read_safetensors
from mlc_llm.weights.stored import StoredTensor
from mlc_llm.weights.torch_file import read_torch_file

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Container:
    """A kind of file: the name of a single one, that of the index of several, and its reader."""

    single_name: str
    index_name: str
    read: Callable[[Path], Mapping[str, StoredTensor]]

    def is_in(self, directory: Path) -> bool:
        """Return whether a directory has weights of this kind."""
        return any((directory / name).is_file() for name in (self.single_name, self.index_name))


SAFETENSORS = Container("model.safetensors", "model.safetensors.index.json", read_safetensors)
TORCH = Container("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_file)

_READABLE = ("float32", "float16", "bfloat16")


class HuggingFaceSource:
    """A directory with `config.json` and weights of one container; satisfies WeightSource."""

    def __init__(self, directory: Path, container: Container = SAFETENSORS) -> None:
        """Read config, index and headers.

        Raises ModelNotFound where a file is not there, CorruptFile where one is damaged, and
        UnsupportedModel where a file holds other things than tensors.
        """
        self._directory = directory
        self.config: dict[str, Any] = read_json_object(directory / CONFIG_NAME)
        if (directory / container.single_name).is_file():
            self._entries = dict(container.read(directory / container.single_name))
        elif (directory / container.index_name).is_file():
            self._entries = _read_sharded(directory, container)
        else:
            raise ModelNotFound(
                f"{directory} has neither {container.single_name} nor {container.index_name}"
            )

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype. Raises ParameterMismatch if unknown."""
        return self._entry(name).dtype

    def read(self, name: str) -> NDArray[Any]:
        """Map a tensor, read-only. Raises UnsupportedModel on dtypes that are not weights."""
        entry = self._entry(name)
        if entry.dtype == "float64":
            return entry.read().astype(np.float32)
        if entry.dtype not in _READABLE:
            raise UnsupportedModel(
                f"tensor {name} in {entry.path} is {entry.dtype}; "
                f"weights must be one of {', '.join(_READABLE)}"
            )
        return entry.read()

    def read_stored(self, name: str) -> NDArray[Any]:
        """Map a tensor, read-only, as it is stored: packed integers and 8-bit floats too."""
        return self._entry(name).read()

    def files(self) -> list[Path]:
        """Return the files in use."""
        return sorted({entry.path for entry in self._entries.values()})

    def close(self) -> None:
        """Forget the headers; mappings live as long as the arrays handed out."""
        self._entries = {}

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._entries:
            raise ParameterMismatch(f"{self._directory} has no tensor {name}")
        return self._entries[name]


def _read_sharded(directory: Path, container: Container) -> dict[str, StoredTensor]:
    index_path = directory / container.index_name
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{index_path} has no weight_map; fetch it again")
    headers: dict[str, Mapping[str, StoredTensor]] = {}
    entries = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or os.path.basename(file_name) != file_name:
            raise CorruptFile(f"{index_path}: {file_name!r} is not the name of a file beside it")
        if file_name not in headers:
            path = directory / file_name
            if not path.is_file():
                raise CorruptFile(
                    f"{path} is listed in {index_path.name} but is not there; fetch the file"
                )
            headers[file_name] = container.read(path)
        if name not in headers[file_name]:
            raise CorruptFile(
                f"{directory / file_name} lacks tensor {name}, which {index_path.name} promises; "
                "fetch both files again"
            )
        entries[name] = headers[file_name][name]
    return entries
