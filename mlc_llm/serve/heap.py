"""How the process gives memory back. Knows glibc's allocator; others are left as they are."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

# Parameters of glibc's mallopt, and their values here.
_SETTINGS = (
    (-8, 2),  # M_ARENA_MAX
    (-3, 4 << 20),  # M_MMAP_THRESHOLD, which also keeps it from rising by itself
    (-1, 16 << 20),  # M_TRIM_THRESHOLD
)
_STATUS = Path("/proc/self/statm")
_INTERVAL_S = 5.0


def return_freed_memory() -> bool:
    """Let what large requests took go back to the system; return False where there is no glibc.

    By default every thread has a heap of its own, and each keeps what its largest task took: a
    server under mixed load grew to 640 MiB, with these settings to 480 (scripts/soak.py, 2 cores,
    2026-11-21). To be called before other threads start.
    """
    try:
        libc = ctypes.CDLL(None)
        has_set = all(libc.mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
        trim = libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    if has_set and _STATUS.exists():
        watch = threading.Thread(target=_give_back_gaps, args=(trim,), name="heap", daemon=True)
        watch.start()
    return has_set


def _give_back_gaps(trim: Callable[[int], int]) -> None:
    """Give back whole pages between what stays, which only `malloc_trim` does.

    It takes a millisecond, 8 where there is much to give back. An idle process is left alone.
    """
    level = ""
    while not threading.Event().wait(_INTERVAL_S):
        if _resident() != level:
            trim(0)
            level = _resident()


def _resident() -> str:
    return _STATUS.read_text().split()[1]  # pages
