"""How the process gives memory back. Knows glibc's allocator; others are left as they are."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, and their values here.
_SETTINGS = (
    (-8, 2),  # M_ARENA_MAX
    (-3, 4 << 20),  # M_MMAP_THRESHOLD, which also keeps it from rising by itself
    (-1, 16 << 20),  # M_TRIM_THRESHOLD
)


def return_freed_memory() -> bool:
    """Let what large requests took go back to the system; return False where there is no glibc.

    By default every thread has a heap of its own, and each keeps what its largest task took: a
    server under mixed load grew to 640 MiB, with these settings to 480 (scripts/soak.py, 2 cores,
    2026-11-21). To be called before other threads start.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
