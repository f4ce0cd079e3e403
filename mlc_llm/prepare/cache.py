"""The cache on disk: where things lie, what may be written, and how writers keep apart.

Knows directories, policies and locks. Does not know what is in a model or a library.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import quote

from mlc_llm.errors import OptionError, StorageError
from mlc_llm.home import cache_root
from mlc_llm.prepare.progress import Progress

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
# In names of directories that are about to be removed; what is left of them is waste.
OLD_MARK = ".old-"
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


class CachePolicy(Enum):
    """What may be read from the cache and written to it."""

    ON = "ON"  # use what is there, add what is missing
    OFF = "OFF"  # neither read nor write: work in a directory removed at exit
    REDO = "REDO"  # make it again and replace what is there
    READONLY = "READONLY"  # use what is there; what is missing is an error

    @staticmethod
    def parse(variable: str, environ: Mapping[str, str]) -> CachePolicy:
        """Return the policy an environment variable names, ON where it is not set.

        Raises OptionError.
        """
        text = environ.get(variable) or CachePolicy.ON.name
        try:
            return CachePolicy[text.strip().upper()]
        except KeyError:
            known = ", ".join(policy.name for policy in CachePolicy)
            raise OptionError(f"{variable} is {text!r}; use one of {known}") from None

    @property
    def reads(self) -> bool:
        """Whether an existing entry is used."""
        return self in (CachePolicy.ON, CachePolicy.READONLY)


@dataclass(frozen=True)
class CacheEntry:
    """One thing in the cache, as `doctor` shows it."""

    kind: str
    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class CacheHome:
    """The cache directory.

    root/model_weights/hf/<user>/<repo>[@<revision>]   downloaded repositories
    root/model_weights/local/<key>                     artifacts converted on this machine
    root/model_weights/demo                            the demo model
    root/model_lib/<key>                               compiled libraries
    root/run                                           processes that use models now
    """

    root: Path

    @staticmethod
    def from_environment(
        environ: Mapping[str, str], *, windows: bool = os.name == "nt"
    ) -> CacheHome:
        """Return the home that environment variables choose, or the platform's default."""
        return CacheHome(cache_root(environ, windows=windows))

    @property
    def hub_directory(self) -> Path:
        """Where downloaded repositories lie."""
        return self.root / "model_weights" / "hf"

    @property
    def local_directory(self) -> Path:
        """Where artifacts converted on this machine lie."""
        return self.root / "model_weights" / "local"

    @property
    def demo_directory(self) -> Path:
        """Where the demo model lies."""
        return self.root / "model_weights" / "demo"

    @property
    def library_directory(self) -> Path:
        """Where compiled libraries lie."""
        return self.root / "model_lib"

    @property
    def run_directory(self) -> Path:
        """Where processes that use models say so."""
        return self.root / "run"

    def repository_directory(self, user: str, repo: str, revision: str | None) -> Path:
        """Return the directory of one repository; named revisions lie beside the default one."""
        suffix = "" if revision is None else "@" + quote(revision, safe="")
        return self.hub_directory / user / (repo + suffix)

    def entries(self) -> list[CacheEntry]:
        """Return everything in the cache with its size, in a stable order."""
        groups = (
            ("repository", self.hub_directory, "*/*"),
            ("converted", self.local_directory, "*"),
            ("demo", self.demo_directory, "*"),
            ("library", self.library_directory, "*"),
        )
        return [
            CacheEntry(kind, path.relative_to(base).as_posix(), path, size_of(path))
            for kind, base, pattern in groups
            for path in sorted(base.glob(pattern))
            if not path.name.startswith(".")
        ]

    def size_bytes(self) -> int:
        """Return the bytes the whole cache takes."""
        return size_of(self.root)


def readable_name(name: str, key: str) -> str:
    """Return the name of an entry: what it is, for people, and its key."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key[:16]}"


def size_of(path: Path) -> int:
    """Return the bytes of a file or of all files under a directory; 0 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except FileNotFoundError:
                continue  # removed by another process while we looked
    return total


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and missing permissions into StorageError; `path` is what was written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left on the disk while writing {path}; free some space, or let "
                "MLC_LLM_HOME point to a directory on another disk, and run again"
            ) from error
        if error.errno in _FORBIDDEN:
            raise StorageError(
                f"cannot write {path} ({error.strerror}); check its permissions, or let "
                "MLC_LLM_HOME point to a directory you may write to"
            ) from error
        raise


@contextmanager
def hold_lock(target: Path, progress: Progress, *, lock_path: Path | None = None) -> Iterator[None]:
    """Let one process at a time prepare `target`; others wait and say so.

    The lock file lies beside the target, unless `lock_path` says where, and is freed by the system
    if the process dies. Raises StorageError where the directory cannot be written.
    """
    from filelock import FileLock, Timeout

    lock_path = lock_path or lock_path_of(target)
    with storage_errors(lock_path):
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.message(f"waiting for another process that is preparing {target}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lock_at_once(target: Path) -> Iterator[None]:
    """Hold the lock of `target` as `hold_lock` does. Raises StorageError if another has it."""
    from filelock import FileLock, Timeout

    lock_path = lock_path_of(target)
    with storage_errors(lock_path):
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(
                f"{target} is being prepared by another process; wait until it is done, or stop it"
            ) from None
    try:
        yield
    finally:
        lock.release()


def lock_path_of(target: Path) -> Path:
    """Return the file that processes lock while they prepare `target`."""
    return target.with_name(f".{target.name}.lock")


def drop_lock(target: Path) -> None:
    """Remove the lock file of what is gone; the caller holds the lock.

    Who waits for it sees that, and takes a new one.
    """
    with suppress(OSError):  # Windows keeps files that are open
        lock_path_of(target).unlink()


def discard(path: Path) -> None:
    """Remove a file or directory at once: nobody sees half of it. A link goes, not its target."""
    with storage_errors(path):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{OLD_MARK}"))
        os.replace(path, old / path.name)
        shutil.rmtree(old)


def publish(work: Path, target: Path) -> None:
    """Rename a finished directory to its place; what was there before is removed."""
    with storage_errors(target):
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}{OLD_MARK}"))
            os.replace(target, old / target.name)
            os.replace(work, target)
            shutil.rmtree(old)
        else:
            os.replace(work, target)


def make_temporary_directory() -> Path:
    """Return a new directory that is removed when the process exits."""
    directory = Path(tempfile.mkdtemp(prefix="mlc_llm-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
