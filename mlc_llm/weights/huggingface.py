"""Hugging Face directories with safetensors files, single or sharded.

Headers are checked against the file size before anything is read; tensors are mapped one by one,
so that no more of a file is resident than the tensors in use. Does not know models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, UnsupportedModel

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

# The safetensors library refuses longer headers as well.
_MAX_HEADER_BYTES = 100_000_000
_MAX_EXTENT = 1 << 40

_READABLE: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class HuggingFaceSource:
    """A directory with `config.json` and safetensors files; satisfies WeightSource."""

    def __init__(self, directory: Path) -> None:
        """Read config, index and headers.

        Raises ModelNotFound where a file is not there, CorruptFile where one is damaged.
        """
        self._directory = directory
        self.config: dict[str, Any] = read_json_object(directory / CONFIG_NAME)
        if (directory / SINGLE_NAME).is_file():
            self._entries = _read_header(directory / SINGLE_NAME)
        elif (directory / INDEX_NAME).is_file():
            self._entries = _read_sharded(directory)
        else:
            raise ModelNotFound(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        return self._entry(name).shape

    def read(self, name: str) -> NDArray[Any]:
        """Map a tensor, read-only. Raises UnsupportedModel on dtypes that are not weights."""
        entry = self._entry(name)
        if entry.dtype not in _READABLE:
            raise UnsupportedModel(
                f"tensor {name} in {entry.path} is {entry.dtype}; "
                f"weights must be one of {', '.join(_READABLE)}"
            )
        dtype = np.dtype(_READABLE[entry.dtype])
        if entry.size_bytes == 0:
            return np.zeros(entry.shape, dtype)
        try:
            raw = np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.size_bytes,))
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{entry.path} cannot be read ({error}); fetch it again") from None
        tensor: NDArray[Any] = raw.view(dtype)
        return tensor.reshape(entry.shape)

    def files(self) -> list[Path]:
        """Return the safetensors files in use."""
        return sorted({entry.path for entry in self._entries.values()})

    def close(self) -> None:
        """Forget the headers; mappings live as long as the arrays handed out."""
        self._entries = {}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ParameterMismatch(f"{self._directory} has no tensor {name}")
        return self._entries[name]


def _read_sharded(directory: Path) -> dict[str, _Entry]:
    index_path = directory / INDEX_NAME
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{index_path} has no weight_map; fetch it again")
    headers: dict[str, dict[str, _Entry]] = {}
    entries = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or os.path.basename(file_name) != file_name:
            raise CorruptFile(f"{index_path}: {file_name!r} is not the name of a file beside it")
        if file_name not in headers:
            path = directory / file_name
            if not path.is_file():
                raise CorruptFile(
                    f"{path} is listed in {INDEX_NAME} but is not there; fetch the file"
                )
            headers[file_name] = _read_header(path)
        if name not in headers[file_name]:
            raise CorruptFile(
                f"{directory / file_name} lacks tensor {name}, which {INDEX_NAME} promises; "
                "fetch both files again"
            )
        entries[name] = headers[file_name][name]
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    """Return the tensors of one safetensors file, every extent checked against its size."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CorruptFile(
                    f"{path} is not a whole safetensors file: its header says {header_bytes:,} "
                    f"bytes, the file has {file_bytes:,}; fetch it again"
                )
            text = stream.read(header_bytes)
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} has a damaged header ({error}); fetch it again") from None
    if not isinstance(header, dict):
        raise CorruptFile(f"{path} has a header that is no JSON object; fetch it again")
    start = 8 + header_bytes
    entries = {}
    for name, item in header.items():
        if name != "__metadata__":
            entries[name] = _check_entry(path, name, item, start, file_bytes - start)
    return entries


def _check_entry(path: Path, name: str, item: Any, start: int, data_bytes: int) -> _Entry:
    damaged = CorruptFile(f"{path} has a damaged entry for tensor {name!r}; fetch it again")
    if not isinstance(item, Mapping):
        raise damaged
    dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or not _is_counts(shape) or not _is_counts(offsets):
        raise damaged
    if dtype not in _ITEM_BYTES:
        raise UnsupportedModel(f"tensor {name} in {path} has the unknown dtype {dtype!r}")
    size_bytes = _ITEM_BYTES[dtype]
    for extent in shape:
        size_bytes *= extent
    if len(offsets) != 2 or max(shape, default=0) > _MAX_EXTENT:
        raise damaged
    begin, end = offsets
    if end - begin != size_bytes:
        raise damaged
    if end > data_bytes:
        raise CorruptFile(
            f"{path} is truncated: tensor {name} ends at byte {start + end:,}, "
            f"the file has {start + data_bytes:,}; fetch it again"
        )
    return _Entry(path, dtype, tuple(shape), start + begin, size_bytes)


def _is_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
