"""What was made of what: converted copies name their source, libraries the artifacts they run.

Knows the small records beside both and when a copy is out of date. Does not convert or compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.artifact import read_json_object, write_atomically
from mlc_llm.errors import MlcError

ORIGIN_NAME = ".origin.json"
USERS_NAME = "users.json"
_CONVERSION_VERSION = 2  # raised when artifacts converted before must be made again
_SOURCE_SUFFIXES = (
    *(".json", ".jinja", ".safetensors", ".bin", ".gguf"),
    *(".model", ".txt", ".tiktoken"),
)


@dataclass(frozen=True)
class Origin:
    """What an artifact in the cache was converted from, and by which release.

    files: name, size in bytes and time of change in nanoseconds of each file of the source, and of
    the LoRA adapter, "" for none, that was merged into it.
    """

    source: str
    quantization: str
    release: list[Any]
    files: list[list[Any]]
    adapter: str = ""

    @staticmethod
    def of(source: Path, quantization: str, adapter: Path | None = None) -> Origin:
        """Describe a source as it is now."""
        files, name = _source_files(source), ""
        if adapter is not None:
            files, name = files + _source_files(adapter), str(adapter.resolve())
        return Origin(str(source.resolve()), quantization, _release(), files, name)

    def is_current(self) -> bool:
        """Return whether the source is there, unchanged, and would be converted as it was."""
        paths = [Path(name) for name in (self.source, self.adapter) if name]
        if self.release != _release() or not all(path.exists() for path in paths):
            return False
        return self.files == [entry for path in paths for entry in _source_files(path)]


def conversion_key(source: Path, quantization: str, adapter: Path | None = None) -> str:
    """Return a hash that changes when files of the source do, or the way they are converted."""
    origin = Origin.of(source, quantization, adapter)
    return hashlib.sha256(json.dumps(dataclasses.astuple(origin)).encode()).hexdigest()


def _release() -> list[Any]:
    from mlc_llm import __version__

    return [_CONVERSION_VERSION, __version__]


def _source_files(source: Path) -> list[list[Any]]:
    """Return name, size and time of change of the files of a checkpoint."""
    if source.is_file():
        files = [source]
    else:
        # Files that begin with a dot are records of ours.
        names = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
        files = [path for path in names if path.suffix.lower() in _SOURCE_SUFFIXES]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def write_origin(artifact: Path, origin: Origin) -> None:
    """Write the record of a converted copy."""
    write_atomically(artifact / ORIGIN_NAME, json.dumps(dataclasses.asdict(origin)) + "\n")


def read_origin(artifact: Path) -> Origin | None:
    """Return the record of a converted copy, None where there is none that can be read."""
    try:
        return Origin(**read_json_object(artifact / ORIGIN_NAME))
    except (MlcError, OSError, TypeError):
        return None


def note_user(library: Path, artifact: Path) -> None:
    """Note that an artifact runs on a cached library, and when.

    Nothing is noted in a cache that cannot be written: it is no reason to refuse a chat.
    """
    users = {**read_users(library), str(artifact.resolve()): time.time()}
    with contextlib.suppress(OSError):
        write_atomically(library / USERS_NAME, json.dumps(users, indent=1) + "\n")


def read_users(library: Path) -> dict[str, float]:
    """Return the artifacts that ran on a cached library, and when last, in seconds since 1970."""
    try:
        content = read_json_object(library / USERS_NAME)
    except (MlcError, OSError):
        return {}
    return {name: float(at) for name, at in content.items() if isinstance(at, (int, float))}
