"""A repository on the hub as a directory whose weights are holes: enough to describe the model.

Configuration files are fetched, of weight files only the headers; each file has its true size but
takes no room on the disk. Does not interpret what it fetches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlc_llm.errors import CorruptFile
from mlc_llm.prepare.download import HubAccess, RepoRef, select_files
from mlc_llm.prepare.hub import connect, explained, list_files
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.transfer import CutShort, RemoteFile, Transfer, hub_tools

_TIMEOUT_S = 10.0
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt")
# Vocabularies, which are large and not shown.
_SKIPPED = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_LICENCE_FILES = ("license", "licence", "license.txt", "licence.txt", "license.md", "licence.md")
_FIRST_BYTES = {".safetensors": 1 << 16, ".gguf": 1 << 20}
# The safetensors library refuses longer headers; GGUF vocabularies are far smaller.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Preview:
    """What the hub tells of a model. path: a directory, or the .gguf file in it."""

    path: Path
    licence: str | None


def preview_repository(ref: RepoRef, directory: Path, access: HubAccess) -> Preview:
    """Fetch configuration and headers of a repository into an empty directory.

    Raises ModelNotFound, OptionError, UnsupportedModel, DownloadError, StorageError, CorruptFile.
    """
    api, headers = connect(access)
    with explained(ref, api.endpoint, directory, lambda: False):
        _, licence, listing = list_files(api, ref)
        names = select_files(listing, ref)
        names += [name for name in listing if name.lower() in _LICENCE_FILES]
        transfer = Transfer(directory, headers, NullProgress(), access.retry_delay_s)
        for name in names:
            file, path = listing[name], directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(_WEIGHTS):
                _make_hole(path, file, _fetch_head(path, file, headers))
            elif name in _SKIPPED:
                _make_hole(path, file, b"")
            else:
                transfer.fetch(file)
    is_gguf = len(names) >= 1 and names[0].lower().endswith(".gguf")
    return Preview(directory / names[0] if is_gguf else directory, licence)


def _make_hole(path: Path, file: RemoteFile, head: bytes) -> None:
    """Write a file that begins with `head` and is zeros, which take no room, up to its size."""
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(max(file.size_bytes or 0, len(head)))


def _fetch_head(path: Path, file: RemoteFile, headers: Mapping[str, str]) -> bytes:
    """Return the header of a weight file, b"" for kinds that have it elsewhere."""
    kind = path.suffix.lower()
    if kind not in _FIRST_BYTES or file.name.startswith("params_shard_"):
        return b""
    head = b""
    wanted = _FIRST_BYTES[kind]
    while len(head) < wanted:
        head += _fetch_range(file, headers, len(head), wanted - len(head))
        if file.size_bytes is not None and len(head) >= file.size_bytes:
            break
        wanted = _header_bytes(path, file, head)
        if wanted > _MAX_HEADER_BYTES:
            raise CorruptFile(f"{file.name} claims a header of {wanted:,} bytes; it is damaged")
    return head


def _header_bytes(path: Path, file: RemoteFile, head: bytes) -> int:
    """Return how many bytes the header takes, or more than there are if that cannot be told."""
    if path.suffix.lower() == ".safetensors":
        return 8 + int.from_bytes(head[:8], "little")
    from mlc_llm.weights.gguf_file import GGUFFile

    # What is missing reads as zeros: that fails, or puts the tensors behind what is there.
    _make_hole(path, file, head)
    try:
        tensors = GGUFFile(path).tensors.values()
    except CorruptFile:
        return 4 * len(head)
    start = min((tensor.offset for tensor in tensors), default=0)
    return len(head) if start <= len(head) else 4 * len(head)


def _fetch_range(file: RemoteFile, headers: Mapping[str, str], start: int, count: int) -> bytes:
    """Return `count` bytes of a file, fewer at its end."""
    asked = {**headers, "Accept-Encoding": "identity"}
    asked["Range"] = f"bytes={start}-{start + count - 1}"
    tools = hub_tools()
    session = tools.get_session()
    with session.stream("GET", file.url, headers=asked, timeout=_TIMEOUT_S) as response:
        if response.status_code >= 400:
            response.read()
            tools.hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) >= skip + count:
                break
    found = bytes(body[skip : skip + count])
    if not found:
        raise CutShort(f"{file.name} ended at byte {start:,}")
    return found
