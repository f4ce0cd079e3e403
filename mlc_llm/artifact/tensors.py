"""Tensors of an artifact: their dtypes and shapes, and the index that says where they lie.

Does not know what tensors mean, nor how shards are written (`weights/shards.py`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact.files import read_json_object
from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, UnsupportedModel

TENSOR_INDEX_NAMES = ("tensor-cache.json", "ndarray-cache.json")
SHARD_LIMIT_BYTES = 32 << 20

_NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "uint32": np.uint32,
    "int32": np.int32,
    "uint8": np.uint8,
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name used in tensor indices. Raises UnsupportedModel."""
    if name not in _NUMPY_DTYPES:
        raise UnsupportedModel(
            f"tensor dtype {name!r} is not supported; known: {', '.join(_NUMPY_DTYPES)}"
        )
    dtype: np.dtype[Any] = np.dtype(_NUMPY_DTYPES[name])
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one parameter, as an artifact stores and a library expects it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes the tensor takes in memory."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: `offset` bytes into the file `path`, and how it is encoded."""

    spec: TensorSpec
    path: Path
    offset: int
    size_bytes: int
    is_f32_as_bf16: bool


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of an artifact by name, in file order."""

    records: dict[str, TensorRecord]
    shard_md5: dict[Path, str]

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor: a private view of the mapped file, or a copy where bytes differ."""
        record = self.records[name]
        stored = ml_dtypes.bfloat16 if record.is_f32_as_bf16 else numpy_dtype(record.spec.dtype)
        if record.size_bytes == 0:
            return np.zeros(record.spec.shape, stored)
        raw = np.memmap(record.path, np.uint8, "c", record.offset, (record.size_bytes,))
        array = raw.view(stored).reshape(record.spec.shape)
        return array.astype(np.float32) if record.is_f32_as_bf16 else array

    def check(self, expected: list[TensorSpec], where: str) -> None:
        """Raise ParameterMismatch unless the index holds exactly the expected tensors."""
        wanted = {spec.name: spec for spec in expected}
        missing = [name for name in wanted if name not in self.records]
        surplus = [name for name in self.records if name not in wanted]
        if missing or surplus:
            raise ParameterMismatch(
                f"weights in {where} do not fit the model:"
                + (f" missing {_abbreviate(missing)};" if missing else "")
                + (f" surplus {_abbreviate(surplus)};" if surplus else "")
                + " convert the weights again with the same configuration"
            )
        for name, spec in wanted.items():
            found = self.records[name].spec
            if found != spec:
                raise ParameterMismatch(
                    f"weights in {where} do not fit the model: it wants {spec}, found {found}; "
                    "convert the weights again with the same configuration"
                )

    def verify_checksums(self) -> None:
        """Raise CorruptFile if a shard's MD5 differs from the index. Reads every byte."""
        for path, expected in self.shard_md5.items():
            if (found := _md5_of(path)) != expected:
                raise CorruptFile(
                    f"{path} is damaged (MD5 {found}, expected {expected}); fetch it again"
                )


def _md5_of(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _abbreviate(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def find_tensor_index(directory: Path) -> Path | None:
    """Return the path of the tensor index, under either name, or None."""
    paths = (directory / name for name in TENSOR_INDEX_NAMES)
    return next((path for path in paths if path.is_file()), None)


def read_tensor_index(directory: Path) -> TensorIndex:
    """Read and check the tensor index (sizes of shards included, checksums not).

    Raises ModelNotFound where there is none, CorruptFile where index or shards are damaged.
    """
    path = find_tensor_index(directory)
    if path is None:
        raise ModelNotFound(
            f"{directory} has no weights ({' or '.join(TENSOR_INDEX_NAMES)}); "
            "run `mlc_llm convert_weight` first"
        )
    data = read_json_object(path)
    records: dict[str, TensorRecord] = {}
    checksums: dict[Path, str] = {}
    try:
        for shard in data["records"]:
            shard_path = directory / _safe_name(shard["dataPath"])
            _check_shard(shard_path, int(shard["nbytes"]))
            if shard.get("md5sum"):
                checksums[shard_path] = str(shard["md5sum"])
            for record in _read_records(shard, shard_path):
                records[record.spec.name] = record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{path} is not a tensor index ({error!r}); fetch it again") from None
    return TensorIndex(records, checksums)


def _safe_name(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"shard name {name!r} leaves the directory")
    return name


def _check_shard(path: Path, size_bytes: int) -> None:
    if not path.is_file():
        raise CorruptFile(f"{path} is missing; download or convert the weights again")
    found = path.stat().st_size
    if found != size_bytes:
        raise CorruptFile(
            f"{path} has {found:,} bytes, the index says {size_bytes:,}; fetch the file again"
        )


def _read_records(shard: Mapping[str, Any], path: Path) -> Iterator[TensorRecord]:
    for item in shard["records"]:
        shape = tuple(int(extent) for extent in item["shape"])
        spec = TensorSpec(str(item["name"]), shape, str(item["dtype"]))
        size, offset = int(item["nbytes"]), int(item["byteOffset"])
        # TVM's rule: the format only has effect on float32, whose bytes are then bfloat16.
        as_bf16 = spec.dtype == "float32" and item.get("format") == "f32-to-bf16"
        expected = spec.size_bytes // 2 if as_bf16 else spec.size_bytes
        if min(shape, default=0) < 0 or offset < 0 or size != expected:
            raise ValueError(f"bad record {spec}: {size} bytes at {offset}")
        if offset + size > int(shard["nbytes"]):
            raise ValueError(f"record {spec} ends beyond its shard")
        yield TensorRecord(spec, path, offset, size, as_bf16)
