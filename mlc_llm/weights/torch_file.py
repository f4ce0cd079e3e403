"""PyTorch checkpoints (`pytorch_model.bin`): the ZIP container and the older stream of pickles.

PyTorch is not needed: torch_pickle.py reads the description of the tensors, their values are
mapped from the file. Everything is checked against the size of the file first.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.weights.stored import STORED_DTYPES, map_bytes
from mlc_llm.weights.torch_pickle import MAX_PICKLE_BYTES, StorageRef, TensorRef, TorchPickle
from mlc_llm.weights.zip_members import ZipMember, read_members

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_COUNT_BYTES = 8  # before each storage of the older format


@dataclass(frozen=True)
class _Bytes:
    """Where a storage lies: a piece of the file, or a compressed member of the archive."""

    path: Path
    offset: int
    size_bytes: int
    packed: ZipMember | None = None

    def read(self) -> NDArray[np.uint8]:
        if self.packed is not None:
            return np.frombuffer(self.packed.read(), np.uint8)
        return map_bytes(self.path, self.offset, self.size_bytes)


@dataclass(frozen=True)
class TorchTensor:
    """One tensor; satisfies StoredTensor. It may lie in any order on its storage."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: _Bytes

    def read(self) -> NDArray[Any]:
        """Return the tensor, a view of the mapped file. Raises CorruptFile."""
        dtype = STORED_DTYPES[self.dtype]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        raw = self.storage.read()
        values: NDArray[Any] = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        # Offset and strides were checked against the storage when the file was opened.
        return np.lib.stride_tricks.as_strided(
            values[self.offset :],
            self.shape,
            tuple(stride * dtype.itemsize for stride in self.strides),
            writeable=False,
        )


def read_torch_file(path: Path) -> dict[str, TorchTensor]:
    """Return the tensors of a file by name. Raises CorruptFile or UnsupportedModel."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from None
    if begin == b"PK\x03\x04":
        described, places = _read_zip(path)
    else:
        described, places = _read_stream(path)
    return {
        name: _place(path, name, tensor, places)
        for name, tensor in _named_tensors(described, path).items()
    }


def _named_tensors(content: Any, path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a state dictionary, which may be the one value of another."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} holds no dictionary of tensors; give a state dictionary")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise UnsupportedModel(
                f"{path}: {name!r:.80} is a {type(value).__name__}, not a tensor; give a state "
                "dictionary of tensors"
            )
    return content


def _place(
    path: Path, name: str, tensor: TensorRef, places: Mapping[StorageRef, _Bytes]
) -> TorchTensor:
    place = places.get(tensor.storage)
    if place is None:
        raise CorruptFile(
            f"{path} lacks the values of {name!r:.80} ({tensor.storage.key!r:.20}); fetch it again"
        )
    return TorchTensor(path, tensor.dtype, tensor.shape, tensor.strides, tensor.offset, place)


def _storages(content: Any, path: Path) -> set[StorageRef]:
    return {tensor.storage for tensor in _named_tensors(content, path).values()}


def _size_of(storage: StorageRef) -> int:
    itemsize = 1 if storage.dtype is None else STORED_DTYPES[storage.dtype].itemsize
    return storage.num_items * itemsize


def _read_zip(path: Path) -> tuple[Any, dict[StorageRef, _Bytes]]:
    members = read_members(path)
    described = [name for name in members if name.endswith("/data.pkl")]
    if len(described) != 1:
        raise CorruptFile(f"{path} is an archive without a description (data.pkl)")
    base = described[0].removesuffix("data.pkl")
    if base + "constants.pkl" in members:
        raise UnsupportedModel(f"{path} is a TorchScript program; give a state dictionary")
    order = members.get(base + "byteorder")
    if order is not None and (order.size_bytes > 8 or order.read() != b"little"):
        raise UnsupportedModel(f"{path} was saved by a big-endian machine, which is not supported")
    if members[described[0]].size_bytes > MAX_PICKLE_BYTES:
        raise CorruptFile(f"{path}: data.pkl has {members[described[0]].size_bytes:,} bytes")
    content = TorchPickle(members[described[0]].read(), str(path)).load()
    places = {}
    for storage in _storages(content, path):
        member = members.get(f"{base}data/{storage.key}")
        if member is None:
            continue
        if member.size_bytes < _size_of(storage):
            raise CorruptFile(
                f"{path}: {member.name!r:.80} has {member.size_bytes:,} bytes, "
                f"{_size_of(storage):,} are described; fetch it again"
            )
        packed = member if member.is_compressed else None
        places[storage] = _Bytes(path, member.offset, member.stored_bytes, packed)
    return content, places


def _read_stream(path: Path) -> tuple[Any, dict[StorageRef, _Bytes]]:
    """Read the format of PyTorch before 1.6: pickles, then storages, each after its length."""
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _parse_stream(data, path)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CorruptFile(f"{path} cannot be read: {error}") from None


def _parse_stream(data: mmap.mmap, path: Path) -> tuple[Any, dict[StorageRef, _Bytes]]:
    position = 0

    def next_object() -> Any:
        nonlocal position
        reader = TorchPickle(data[position : position + MAX_PICKLE_BYTES], str(path))
        loaded = reader.load()
        position += reader.position
        return loaded

    if data[:1] != b"\x80" or next_object() != _MAGIC_NUMBER:
        raise CorruptFile(f"{path} is not a PyTorch checkpoint, or not its beginning")
    version, system = next_object(), next_object()
    if version != _STREAM_VERSION or not isinstance(system, dict):
        raise UnsupportedModel(f"{path} has an unknown version of PyTorch's format")
    if system.get("little_endian") is not True:
        raise UnsupportedModel(f"{path} was saved by a big-endian machine, which is not supported")
    content, keys = next_object(), next_object()
    storages: dict[Any, list[StorageRef]] = {}
    for storage in _storages(content, path):
        storages.setdefault(storage.key, []).append(storage)
    places: dict[StorageRef, _Bytes] = {}
    for key in keys if isinstance(keys, list) else ():
        described = storages.get(key) if isinstance(key, str) else None
        if described is None:
            # Without its dtype, its length in bytes is unknown, so is the next one's place.
            raise UnsupportedModel(f"{path} holds values ({key!r:.20}) that no tensor uses")
        count = int.from_bytes(data[position : position + _COUNT_BYTES], "little", signed=True)
        position += _COUNT_BYTES
        size_bytes = _size_of(described[0])
        if count != described[0].num_items or len(described) > 1 or key in places:
            raise CorruptFile(f"{path} is damaged: {count:,} values under {key!r:.20}")
        if position + size_bytes > len(data):
            raise CorruptFile(
                f"{path} is truncated: values end at byte {position + size_bytes:,}, the file "
                f"has {len(data):,}; fetch it again"
            )
        places[described[0]] = _Bytes(path, position, size_bytes)
        position += size_bytes
    return content, places
