"""Where the members of a ZIP archive lie, checked against the file, so that they can be mapped.

Python's `zipfile` hides the places of members and takes memory for what a damaged file claims.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from mlc_llm.errors import CorruptFile, UnsupportedModel

_MAX_MEMBERS = 1 << 20
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_END_BYTES, _END_64_BYTES, _LOCATOR_64_BYTES = 22, 56, 20
_ENTRY_BYTES, _LOCAL_BYTES = 46, 30
_FULL_32, _FULL_16 = 0xFFFFFFFF, 0xFFFF
_MAX_COMMENT = 0xFFFF
# Deflate makes at most 1032 bytes of one.
_MAX_INFLATION = 1040


@dataclass(frozen=True)
class ZipMember:
    """One member: `stored_bytes` at `offset` of the file, `size_bytes` when unpacked."""

    path: Path
    name: str
    offset: int
    stored_bytes: int
    size_bytes: int
    is_compressed: bool

    def read(self) -> bytes:
        """Return the content. Raises CorruptFile."""
        damaged = CorruptFile(f"{self.path}: {self.name!r:.80} cannot be unpacked; fetch it again")
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                content = stream.read(self.stored_bytes)
            if self.is_compressed:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.size_bytes)
        except (OSError, zlib.error):
            raise damaged from None
        if len(content) != self.size_bytes:
            raise damaged
        return content


def read_members(path: Path) -> dict[str, ZipMember]:
    """Return the members of an archive by name. Raises CorruptFile or UnsupportedModel."""
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read_directory(data, path)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CorruptFile(f"{path} cannot be read: {error}") from None
    except struct.error:
        raise _damaged(path, "its directory is cut off") from None


def _damaged(path: Path, problem: str) -> CorruptFile:
    return CorruptFile(f"{path} is not a whole archive: {problem}; fetch it again")


def _read_directory(data: mmap.mmap, path: Path) -> dict[str, ZipMember]:
    count, position, end = _find_directory(data, path)
    members: dict[str, ZipMember] = {}
    for _ in range(count):
        if data[position : position + 4] != _ENTRY:
            raise _damaged(path, f"no member at byte {position:,}")
        member, position = _read_entry(data, position, path)
        if position > end:
            raise _damaged(path, "its directory is too long")
        if member.name in members:
            raise _damaged(path, f"it holds {member.name!r:.80} twice")
        members[member.name] = member
    return members


def _find_directory(data: mmap.mmap, path: Path) -> tuple[int, int, int]:
    """Return the number of members, and where the directory begins and ends."""
    at = data.rfind(_END, max(0, len(data) - _END_BYTES - _MAX_COMMENT))
    if at < 0 or at + _END_BYTES > len(data):
        raise _damaged(path, "its end is missing")
    count, size, begin = struct.unpack_from("<H2I", data, at + 10)
    if count == _FULL_16 or _FULL_32 in (size, begin):
        locator = at - _LOCATOR_64_BYTES
        if locator < 0 or data[locator : locator + 4] != _LOCATOR_64:
            raise _damaged(path, "its end is damaged")
        (at,) = struct.unpack_from("<Q", data, locator + 8)
        if at + _END_64_BYTES > len(data) or data[at : at + 4] != _END_64:
            raise _damaged(path, "its end is damaged")
        count, size, begin = struct.unpack_from("<3Q", data, at + 32)
    if count > _MAX_MEMBERS or begin + size > len(data):
        raise _damaged(path, f"it claims {count:,} members at byte {begin:,}")
    return count, begin, begin + size


def _read_entry(data: mmap.mmap, at: int, path: Path) -> tuple[ZipMember, int]:
    flags, method = struct.unpack_from("<2H", data, at + 8)
    stored, size, name_len, extra_len, comment_len = struct.unpack_from("<2I3H", data, at + 20)
    (local,) = struct.unpack_from("<I", data, at + 42)
    name_at = at + _ENTRY_BYTES
    extra_at = name_at + name_len
    following = extra_at + extra_len + comment_len
    if following > len(data):
        raise _damaged(path, "its directory is cut off")
    name = data[name_at:extra_at].decode("utf-8", "replace")
    if _FULL_32 in (stored, size, local):
        wide = _wide_numbers(data[extra_at : extra_at + extra_len])
        size, stored, local = (
            wide.pop(0) if number == _FULL_32 and wide else number
            for number in (size, stored, local)
        )
    if flags & 1 or method not in (0, 8):
        raise UnsupportedModel(
            f"{path}: {name!r:.80} is encrypted or compressed in an unusual way; "
            "save the checkpoint again with torch.save"
        )
    if local + _LOCAL_BYTES > len(data) or data[local : local + 4] != _LOCAL:
        raise _damaged(path, f"{name!r:.80} is not where it should be")
    offset = local + _LOCAL_BYTES + sum(struct.unpack_from("<2H", data, local + 26))
    if offset + stored > len(data):
        raise _damaged(path, f"{name!r:.80} ends beyond the file")
    if size != stored if method == 0 else size > stored * _MAX_INFLATION:
        raise _damaged(path, f"{name!r:.80} cannot have {size:,} bytes")
    return ZipMember(path, name, offset, stored, size, method == 8), following


def _wide_numbers(extra: bytes) -> list[int]:
    """Return the 64-bit numbers of the extra field that stands in for full 32-bit ones."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            content = extra[at + 4 : at + 4 + size]
            return [
                number for (number,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8])
            ]
        at += 4 + size
    return []
