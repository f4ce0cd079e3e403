"""The GGUF container: header, metadata and tensors of one file or of all parts of a split one.

Every count, length and offset is checked against the file before memory is taken for it, so a
damaged file costs an error and nothing else. Does not know what the metadata or tensors mean.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel

_VERSIONS = (2, 3)
_MAX_METADATA = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_ARRAY = 1 << 24
_MAX_DIMENSIONS = 4
_MAX_EXTENT = 1 << 40
_MAX_ALIGNMENT = 1 << 20
# Values one worker dequantizes at a time; the dequantizers need several times that in temporaries.
_BLOCK_VALUES = 1 << 20
_MAX_WORKERS = 8

_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"},
    **{6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Encodings of single values.
UNQUANTIZED = frozenset(("F64", *_PLAIN, "I8", "I16", "I32", "I64"))
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor; `shape` has the slowest dimension first, as Hugging Face writes it."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    path: Path
    offset: int
    size_bytes: int

    def split(self) -> list[GGUFTensor]:
        """Return the parts of a stacked tensor, which lie one after another."""
        return [self.part(number) for number in range(self.shape[0])]

    def part(self, number: int) -> GGUFTensor:
        """Return one part of a stacked tensor, or one row of a matrix."""
        part_bytes = self.size_bytes // self.shape[0]
        return dataclasses.replace(
            self,
            shape=self.shape[1:],
            offset=self.offset + number * part_bytes,
            size_bytes=part_bytes,
        )


class GGUFFile:
    """Metadata and tensors by name. For a split file, name any part."""

    def __init__(self, path: Path) -> None:
        """Read the headers. Raises CorruptFile, or UnsupportedModel for other GGUF versions."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self.parts = _find_parts(path)
        for part in self.parts:
            metadata, tensors = _read_header(part)
            self.metadata = self.metadata or metadata
            for tensor in tensors:
                if tensor.name in self.tensors:
                    raise CorruptFile(f"{part} holds tensor {tensor.name!r} a second time")
                self.tensors[tensor.name] = tensor
        self._check_split()

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a metadata value, or `default`. Raises CorruptFile if it is of another type."""
        value = self.metadata.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CorruptFile(
                f"{self.path}: metadata {key} is {value!r:.40}, which is no {kinds[0].__name__}"
            )
        return value

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor: float16 and bfloat16 as they are, all other types as float32.

        Raises ParameterMismatch if unknown, UnsupportedModel on integers and unknown encodings.
        """
        if name not in self.tensors:
            raise ParameterMismatch(f"{self.path} has no tensor {name}")
        return self.read_tensor(self.tensors[name])

    def read_tensor(self, tensor: GGUFTensor) -> NDArray[Any]:
        """Return a tensor of `tensors`, or a part of one, see `read`."""
        raw = self.map_tensor(tensor)
        if tensor.type.name in _PLAIN:
            plain: NDArray[Any] = raw.view(_PLAIN[tensor.type.name])
            return plain.reshape(tensor.shape)
        if tensor.type.name == "F64":
            return raw.view(np.float64).astype(np.float32).reshape(tensor.shape)
        return _dequantize(raw, tensor)

    def map_tensor(self, tensor: GGUFTensor) -> NDArray[np.uint8]:
        """Map the bytes of a tensor, read-only. Raises CorruptFile."""
        try:
            return np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.size_bytes,))
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{tensor.path} cannot be read ({error}); fetch it again") from None

    def _check_split(self) -> None:
        count = self.get("split.count", int, 1)
        if count > 1 and count != len(self.parts):
            raise CorruptFile(
                f"{self.path} is one of {count} parts; they must lie together under names "
                "that end in -00001-of-0000N.gguf"
            )


def _find_parts(path: Path) -> list[Path]:
    match = _SPLIT_NAME.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise CorruptFile(f"{part} is missing; all {count} parts of {path.name} are needed")
        parts.append(part)
    return parts or [path]


def _dequantize(raw: NDArray[np.uint8], tensor: GGUFTensor) -> NDArray[np.float32]:
    """Decode blocks of rows from a few threads, so that only the result has full size."""
    row_values = tensor.shape[-1]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    rows = raw.reshape(-1, row_values // block_values * block_bytes)
    values = np.empty((len(rows), row_values), np.float32)
    step = max(1, _BLOCK_VALUES // row_values)

    def decode(start: int) -> None:
        part = slice(start, start + step)
        # A damaged block may hold any scale; quantizing finds NaN and infinity.
        with np.errstate(all="ignore"):
            values[part] = gguf.dequantize(rows[part], tensor.type)

    try:
        with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(decode, range(0, len(rows), step)):
                pass
    except NotImplementedError:
        raise UnsupportedModel(
            f"tensor {tensor.name} in {tensor.path} is {tensor.type.name}, which cannot be decoded"
        ) from None
    return values.reshape(tensor.shape)


class _Cursor:
    """Reads little-endian values in order and refuses to leave the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they began."""
        start = self.position
        if size > len(self.data) - start:
            raise CorruptFile(f"{self.path} is truncated or damaged at byte {start:,} (header)")
        self.position = start + size
        return start

    def number(self, code: str) -> int:
        return int(struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0])

    def count(self, limit: int, what: str, code: str = "<Q") -> int:
        found = self.number(code)
        if found > limit:
            raise CorruptFile(f"{self.path} is damaged: it claims {found:,} {what}")
        return found

    def string(self) -> str:
        size = self.number("<Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise CorruptFile(f"{self.path} is damaged: no UTF-8 at byte {start:,}") from None

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalars(kind, 1)[0]
        if kind != _ARRAY:
            raise CorruptFile(f"{self.path} is damaged: metadata of unknown type {kind}")
        kind = self.number("<I")
        count = self.count(_MAX_ARRAY, "elements in an array")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind in _SCALARS:
            return self.scalars(kind, count)
        raise CorruptFile(f"{self.path} is damaged: metadata array of type {kind}")

    def scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize)
        raw = self.data[start : self.position]
        if dtype.kind == "b":
            return [byte != 0 for byte in raw]
        return list(np.frombuffer(raw, dtype).tolist())


def _read_header(path: Path) -> tuple[dict[str, Any], list[GGUFTensor]]:
    try:
        with path.open("rb") as stream:
            if path.stat().st_size < 24 or stream.read(4) != b"GGUF":
                raise CorruptFile(f"{path} is not a GGUF file, or only its beginning")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from None


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], list[GGUFTensor]]:
    cursor.take(4)
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise UnsupportedModel(f"{cursor.path} is a big-endian GGUF file; use a little-endian one")
    if version not in _VERSIONS:
        raise UnsupportedModel(f"{cursor.path} has GGUF version {version}; versions 2 and 3 work")
    num_tensors = cursor.count(_MAX_TENSORS, "tensors")
    num_metadata = cursor.count(_MAX_METADATA, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_metadata):
        key = cursor.string()
        if key in metadata:
            raise CorruptFile(f"{cursor.path} is damaged: metadata {key!r:.40} occurs twice")
        metadata[key] = cursor.value()
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if alignment not in [1 << n for n in range(_MAX_ALIGNMENT.bit_length())]:
        raise CorruptFile(f"{cursor.path} is damaged: alignment {alignment!r:.40}")
    start = -(-cursor.position // int(alignment)) * int(alignment)
    return metadata, [_place(cursor, start, *entry) for entry in entries]


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    dimensions = cursor.count(_MAX_DIMENSIONS, f"dimensions of tensor {name!r:.80}", "<I")
    extents = [cursor.count(_MAX_EXTENT, "rows in a tensor") for _ in range(dimensions)]
    return name, tuple(reversed(extents)), cursor.number("<I"), cursor.number("<Q")


def _place(
    cursor: _Cursor, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GGUFTensor:
    """Check a tensor's encoding and extent against the file."""
    try:
        ggml_type = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedModel(
            f"tensor {name!r:.80} in {cursor.path} has the unknown encoding {kind}"
        ) from None
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    if not shape or min(shape) == 0 or shape[-1] % block_values:
        raise CorruptFile(f"{cursor.path} is damaged: tensor {name!r:.80} has shape {list(shape)}")
    size_bytes = block_bytes * (shape[-1] // block_values)
    for extent in shape[:-1]:
        size_bytes *= extent
    if start + offset + size_bytes > len(cursor.data):
        raise CorruptFile(
            f"{cursor.path} is truncated: tensor {name!r:.80} ends at byte "
            f"{start + offset + size_bytes:,}, the file has {len(cursor.data):,}; fetch it again"
        )
    return GGUFTensor(name, shape, ggml_type, cursor.path, start + offset, size_bytes)
