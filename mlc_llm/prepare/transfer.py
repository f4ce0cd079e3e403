"""Moves one file from a hub to the disk: resumes, retries, checks what arrived.

Knows HTTP (through huggingface_hub's session, for its proxies and certificates) and partial files.
Does not know repositories. huggingface_hub's own downloader throws partial files away when a
process ends, so it is not used here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_llm.errors import DownloadError
from mlc_llm.prepare.cache import storage_errors
from mlc_llm.prepare.progress import Progress

_TIMEOUT_S = 10.0
_MAX_FAILURES = 5  # in a row, without a single byte received
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a fixed commit.

    digest is "sha256:<hex>", "git:<hex>" (git's blob hash, SHA-1), or "" where the hub tells none.
    """

    name: str
    url: str
    size_bytes: int | None
    digest: str


class TransferStopped(Exception):
    """Another file failed, or the user interrupted; this one was left as it is."""


class Transfer:
    """Fetches files into a directory; safe to use from several threads.

    progress: advanced by bytes that arrived or were there already. retry_delay_s: the first wait
    after a failure, doubled with each.
    """

    def __init__(
        self,
        directory: Path,
        headers: Mapping[str, str],
        progress: Progress,
        retry_delay_s: float,
    ) -> None:
        self._directory = directory
        self._headers = dict(headers)
        self._progress = progress
        self._retry_delay_s = retry_delay_s
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let all running fetches end soon by TransferStopped."""
        self._stop.set()

    def fetch(self, file: RemoteFile) -> None:
        """Bring `file` into the directory, whole and checked, or raise.

        Raises DownloadError, StorageError, TransferStopped and, after the retries, the errors of
        huggingface_hub and its HTTP library.
        """
        target = self._directory / file.name
        meter = _Meter(self._count)
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file() and is_intact(target, file):
                meter.move_to(target.stat().st_size)
                return
            partial = partial_path(self._directory, file)
            self._receive_with_retries(file, partial, meter)
            if not is_intact(partial, file):
                partial.unlink()
                raise DownloadError(
                    f"{file.name} from {file.url} arrived damaged (its checksum differs); "
                    "run again to fetch it once more"
                )
            os.replace(partial, target)

    def _receive_with_retries(self, file: RemoteFile, partial: Path, meter: _Meter) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        httpx = hub_tools().httpx
        failures = 0
        while True:
            before = size_or_zero(partial)
            try:
                self._receive(file, partial, meter)
                return
            except HfHubHTTPError as error:
                if error.response.status_code not in _RETRY_STATUS or failures >= _MAX_FAILURES:
                    raise
                reason = f"HTTP status {error.response.status_code}"
            except (httpx.TransportError, CutShort) as error:
                if failures >= _MAX_FAILURES:
                    raise
                reason = str(error) or type(error).__name__
            failures = 1 if size_or_zero(partial) > before else failures + 1
            with self._lock:
                self._progress.message(
                    f"{file.name}: {reason}; going on at byte {size_or_zero(partial):,}"
                )
            if self._stop.wait(self._retry_delay_s * 2 ** (failures - 1)):
                raise TransferStopped

    def _receive(self, file: RemoteFile, partial: Path, meter: _Meter) -> None:
        """Append to `partial` what is missing. Raises CutShort if the body ends early."""
        position = size_or_zero(partial)
        if file.size_bytes is not None and position >= file.size_bytes:
            if position == file.size_bytes > 0:
                meter.move_to(position)
                return
            partial.unlink(missing_ok=True)
            position = 0
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if position:
            headers["Range"] = f"bytes={position}-"
        with (
            hub_tools()
            .get_session()
            .stream("GET", file.url, headers=headers, timeout=_TIMEOUT_S) as response
        ):
            if response.status_code >= 400:
                response.read()
                if response.status_code == 416:  # the partial file does not belong to this one
                    partial.unlink(missing_ok=True)
                    raise CutShort("the server refused to resume")
                hub_tools().hf_raise_for_status(response)
            if response.status_code != 206:
                position = 0
            meter.move_to(position)
            with partial.open("ab" if position else "wb") as out:
                for chunk in response.iter_bytes():
                    if self._stop.is_set():
                        raise TransferStopped
                    out.write(chunk)
                    meter.move_to(meter.position + len(chunk))
        if file.size_bytes is not None and meter.position != file.size_bytes:
            raise CutShort(f"{meter.position:,} of {file.size_bytes:,} bytes arrived")

    def _count(self, n: int) -> None:
        with self._lock:
            self._progress.advance(n)


class CutShort(Exception):
    """The body was shorter than announced, or cannot be continued."""


class _Meter:
    """The position in one file, told on as differences."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self.position = 0

    def move_to(self, position: int) -> None:
        if position != self.position:
            self._advance(position - self.position)
            self.position = position


def hub_tools() -> Any:
    """Return `huggingface_hub.utils`: its session, errors by status, and the HTTP library itself.

    The HTTP library is httpx or its successor, by the version of huggingface_hub.
    """
    from huggingface_hub import utils

    return utils


def partial_path(directory: Path, file: RemoteFile) -> Path:
    """Return where the first bytes of `file` are kept; other contents have other names."""
    target = directory / file.name
    mark = file.digest.rpartition(":")[2][:16] or hashlib.sha256(file.url.encode()).hexdigest()[:16]
    return target.with_name(f"{target.name}.{mark}.partial")


def size_or_zero(path: Path) -> int:
    """Return the size of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def is_intact(path: Path, file: RemoteFile) -> bool:
    """Return whether a file on disk has the size and digest the hub tells; reads all of it."""
    size = path.stat().st_size
    if file.size_bytes is not None and size != file.size_bytes:
        return False
    kind, _, expected = file.digest.partition(":")
    if not expected:
        # Nothing to compare with: only a file that came through a partial file is believed.
        return path.suffix == ".partial"
    digest: Any = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return bool(digest.hexdigest() == expected)
