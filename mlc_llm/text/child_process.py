"""Helper processes for work that must be stopped from outside should it never end.

Knows pipes, frames (4 bytes of length, then JSON) and time limits; does not know what the work is.
The inside of such a process is child.py.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Starting Python is not the doing of what is run, and may take long on a busy machine.
_START_TIMEOUT_S = 60.0
# How a process ends that has used up its processor time.
_OUT_OF_CPU = -signal.SIGPROF if hasattr(signal, "SIGPROF") else None
_ROOT = Path(__file__).resolve().parents[2]


class ChildError(Exception):
    """The helper process could not do its work; the message ends a sentence that says whose."""


class ChildOverdue(ChildError):
    """It was stopped after its time."""


class ChildProcess:
    """A helper process, started on the first use and anew after it has ended.

    Safe to call from several threads; requests wait for each other.
    """

    def __init__(self, script: Path, packages: Sequence[str], memory_limit_bytes: int) -> None:
        """script: a file whose process calls `child.serve`; packages: what it may import."""
        self._script, self._packages = script, tuple(packages)
        self._memory_limit_bytes = memory_limit_bytes
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Launch the process without waiting for it, so that it is ready when needed.

        Raises ChildError if the system cannot start it.
        """
        with self._lock:
            self._running()

    def ask(
        self, request: dict[str, Any], timeout_s: float, cpu_s: float | None = None
    ) -> dict[str, Any]:
        """Return the reply to a request.

        cpu_s: seconds of processor time that it may take, however busy the machine is; only
        timeout_s counts on systems that cannot tell. Raises ChildError, and ValueError, TypeError
        or RecursionError if JSON cannot say the request.
        """
        body = json.dumps({**request, "timeout_s": timeout_s, "cpu_s": cpu_s}).encode()
        with self._lock:
            try:
                return self._running().ask(body, timeout_s)
            finally:
                self._drop_ended()

    def close(self) -> None:
        """End the process; a later call would start another."""
        with self._lock:
            if self._child is not None:
                self._child.close()
                self._child = None

    def _running(self) -> _Child:
        self._drop_ended()
        if self._child is None:
            self._child = _Child(self._script, self._packages, self._memory_limit_bytes)
        return self._child

    def _drop_ended(self) -> None:
        if self._child is not None and self._child.has_ended():
            self._child.close()
            self._child = None


class _Child:
    """One process and the two pipes to it."""

    def __init__(self, script: Path, packages: Sequence[str], memory_limit_bytes: int) -> None:
        command = [sys.executable, "-I", "-S", str(script), str(memory_limit_bytes), str(_ROOT)]
        try:
            self._process = subprocess.Popen(
                [*command, *_find_packages(packages)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Signals of the terminal are for the parent alone.
                start_new_session=True,
            )
        except OSError as error:
            raise ChildError(f"its process cannot be started: {error}") from None
        self._is_ready = False
        self.close = weakref.finalize(self, _end_process, self._process)

    def has_ended(self) -> bool:
        """Say whether the process is gone, by itself or killed."""
        return not self.close.alive or self._process.poll() is not None

    def ask(self, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Send a request and return the reply; whatever interrupts this ends the process."""
        try:
            if not self._is_ready:
                self._exchange(b"", _START_TIMEOUT_S, "its process did not start in")
                self._is_ready = True
            frame = len(body).to_bytes(4, "big") + body
            return self._exchange(frame, timeout_s, "it was still running after")
        except BaseException:
            self.close()
            raise

    def _exchange(self, frame: bytes, timeout_s: float, overdue: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        body = None
        with _killed_after(self._process, timeout_s) as expired:
            try:
                self._process.stdin.write(frame)
                self._process.stdin.flush()
                body = _read_frame(self._process.stdout)
            except OSError:  # a broken pipe: the process is gone
                pass
        if expired.is_set():
            raise ChildOverdue(f"{overdue} {timeout_s:g} s")
        if body is None:
            code = self._process.wait()
            if code == _OUT_OF_CPU:
                raise ChildOverdue("it took more processor time than it may")
            raise ChildError(f"its process ended with code {code}")
        reply: dict[str, Any] = json.loads(body)
        return reply


@contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill the process if the block takes longer, which also ends any wait on its pipes."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()


def _read_frame(stream: IO[bytes]) -> bytes | None:
    """Return the next frame's content, or None if the stream ends before it does."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    body = stream.read(size)
    return body if len(body) == size else None


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, wait for it, close its pipes. It holds nothing worth a farewell."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        try:
            stream.close()
        except OSError:  # what was still to be written has no reader any more
            continue


def _find_packages(names: Sequence[str]) -> list[str]:
    """Return the directories the packages are in, without importing them."""
    directories = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            directories.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(directories))
