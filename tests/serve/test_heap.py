"""Freed memory goes back to the system, also from between what stays."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
import resource
import sys
from mlc_llm.serve.heap import return_freed_memory

def memory_mib():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() >> 20

# What glibc does by itself once a program has freed a block of 32 MiB: smaller ones come from the
# heap (M_MMAP_THRESHOLD), whose end is kept up to twice that (M_TRIM_THRESHOLD).
assert ctypes.CDLL(None).mallopt(-3, 32 << 20) == ctypes.CDLL(None).mallopt(-1, 64 << 20) == 1
if sys.argv[1] == "set":
    assert return_freed_memory()
before = memory_mib()
large, small = [], []
for _ in range(30):
    large.append(bytearray(6 << 20))
    small.append(bytearray(100_000))  # too large for a gap below
for block in large:
    block[::4096] = bytes(len(range(0, len(block), 4096)))
del large, block
print(memory_mib() - before)
"""


def kept_mib(argument: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_memory_goes_back() -> None:
    assert kept_mib("set") < 20
    assert kept_mib("leave") > 60  # or there would be nothing to set
