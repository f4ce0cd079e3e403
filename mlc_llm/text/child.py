"""The inside of a helper process: its limits, and frames (4 bytes of length, then JSON) on pipes.

Imports only the standard library: helper processes start in isolated mode. The other end of the
pipes is child_process.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def serve(handle: Handler, memory_limit_bytes: int, greeting: dict[str, Any]) -> None:
    """Answer requests until the parent closes the pipe.

    Each request has a timeout_s, after which the system ends this process should the parent be
    gone, and maybe a cpu_s, seconds of processor time after which it does so in any case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ.clear()  # access tokens are none of a helper's business
    _limit_process(memory_limit_bytes)
    _write_frame(sys.stdout.buffer, greeting)
    while (request := _read_frame(sys.stdin.buffer)) is not None:
        _set_alarms(request["timeout_s"] + 1, request.get("cpu_s") or 0)
        _write_frame(sys.stdout.buffer, handle(request))
        _set_alarms(0, 0)


def _limit_process(memory_limit_bytes: int) -> None:
    """Bound memory where the system can; let the process write no file and leave no core dump."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; time and output stay bounded there
        return
    for kind, limit in (
        (resource.RLIMIT_AS, memory_limit_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS refuses some
            continue


def _set_alarms(seconds: float, cpu_seconds: float) -> None:
    """Let the system end this process after a time, or so much work; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


def _read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Return the next request, or None when the parent closed the pipe."""
    head = stream.read(4)
    body = stream.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    request: dict[str, Any] | None = json.loads(body) if body else None
    return request


def _write_frame(stream: BinaryIO, reply: dict[str, Any]) -> None:
    """Send a reply."""
    body = json.dumps(reply).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()
