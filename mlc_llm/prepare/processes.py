"""Which processes use models of the cache now: each keeps a small file in its run directory.

Knows the files and who is alive. A file is locked as long as its process lives, so what a killed
process left behind is told apart without asking for its number, which another may have by now.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlc_llm.prepare.cache import CacheHome

# One write of this size is seen whole or not at all; on Windows the lock lies behind it.
_RECORD_BYTES = 8192


@dataclass(frozen=True)
class RunRecord:
    """A process that uses models. command: serve, chat or python.

    url: where a server listens, "" for others and before it does. started: seconds since 1970.
    paths: the artifacts and libraries in use.
    """

    command: str
    model: str
    pid: int
    started: float
    paths: tuple[str, ...]
    url: str = ""

    def uses(self, path: Path) -> bool:
        """Return whether a file or directory of the cache, or something in it, is in use."""
        wanted = path.resolve()
        used = [Path(name) for name in self.paths]
        return any(wanted == other or wanted in other.parents for other in used)


class RunFile:
    """This process's file; it goes when closed, when forgotten, or when the process ends."""

    def __init__(self, home: CacheHome, command: str, model: str, paths: Sequence[Path]) -> None:
        """Write the file. In a cache that cannot be written, or locked, there is none."""
        resolved = tuple(str(path.resolve()) for path in paths)
        self._record = RunRecord(command, model, os.getpid(), time.time(), resolved)
        self._stream: int | None = None
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        path = home.run_directory / f"{name}.json"
        # Under another name until it is locked: an unlocked one counts as left behind.
        temporary = home.run_directory / f".{name}.new"
        try:
            home.run_directory.mkdir(parents=True, exist_ok=True)
            self._stream = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            if not _lock(self._stream):
                raise OSError("cannot lock a new file")
            self._write()
            os.rename(temporary, path)
        except OSError:
            if self._stream is not None:
                os.close(self._stream)
                self._stream = None
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.close = weakref.finalize(self, _end, self._stream, path)

    def listen(self, url: str) -> None:
        """Say where the process answers from now on."""
        self._record = replace(self._record, url=url)
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop serving
                self._write()

    def _write(self) -> None:
        assert self._stream is not None
        content = json.dumps(asdict(self._record)).encode()
        os.lseek(self._stream, 0, os.SEEK_SET)
        os.write(self._stream, content.ljust(_RECORD_BYTES))


def list_processes(home: CacheHome) -> list[RunRecord]:
    """Return the processes that use models of this cache, oldest first; remove what dead ones left.

    Those of other users, or on other machines that share the cache, are listed too.
    """
    records = []
    for path in sorted(home.run_directory.glob("*.json")):
        record = _read_if_alive(path)
        if record is not None:
            records.append(record)
    return sorted(records, key=lambda record: record.started)


def _read_if_alive(path: Path) -> RunRecord | None:
    try:
        stream = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError:
        return _read(path)  # of another user: whether it lives cannot be tried
    try:
        if not _lock(stream):
            return _read(path)
    finally:
        os.close(stream)
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _read(path: Path) -> RunRecord | None:
    try:
        content = json.loads(path.read_bytes())
        return RunRecord(**{**content, "paths": tuple(map(str, content["paths"]))})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _end(stream: int | None, path: Path) -> None:
    if stream is None:
        return
    # Windows removes no open file; elsewhere it goes before the lock does.
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(stream)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _lock(stream: int) -> bool:
    """Lock a file until it is closed; return whether nobody else has. Raises OSError."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(stream, _RECORD_BYTES, os.SEEK_SET)
        try:
            msvcrt.locking(stream, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
