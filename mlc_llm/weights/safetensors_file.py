"""The safetensors container: one header, every entry checked against the size of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.weights.stored import (
    MAX_DIMENSIONS,
    MAX_EXTENT,
    STORED_DTYPES,
    count_values,
    map_bytes,
)

# The safetensors library refuses longer headers as well.
_MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor; satisfies StoredTensor."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def read(self) -> NDArray[Any]:
        """Map the tensor, read-only. Raises CorruptFile."""
        raw = map_bytes(self.path, self.offset, self.size_bytes)
        tensor: NDArray[Any] = raw.view(STORED_DTYPES[self.dtype])
        return tensor.reshape(self.shape)


def read_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """Return the tensors of a file by name. Raises CorruptFile or UnsupportedModel."""
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
    return {
        name: _check_entry(path, name, item, start, file_bytes - start)
        for name, item in header.items()
        if name != "__metadata__"
    }


def _check_entry(
    path: Path, name: str, item: Any, start: int, data_bytes: int
) -> SafetensorsTensor:
    damaged = CorruptFile(f"{path} has a damaged entry for tensor {name!r:.200}; fetch it again")
    if not isinstance(item, Mapping):
        raise damaged
    dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or not _is_counts(shape) or not _is_counts(offsets):
        raise damaged
    if dtype not in _DTYPES:
        raise UnsupportedModel(f"tensor {name} in {path} has the unknown dtype {dtype!r:.40}")
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_EXTENT:
        raise damaged
    begin, end = offsets
    if end - begin != STORED_DTYPES[_DTYPES[dtype]].itemsize * count_values(shape):
        raise damaged
    if end > data_bytes:
        raise CorruptFile(
            f"{path} is truncated: tensor {name} ends at byte {start + end:,}, "
            f"the file has {start + data_bytes:,}; fetch it again"
        )
    return SafetensorsTensor(path, _DTYPES[dtype], tuple(shape), start + begin, end - begin)


def _is_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
