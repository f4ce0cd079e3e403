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


GAPS = """
import resource
import sys
import time
from mlc_llm.serve import heap

def memory_mib():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() >> 20

if sys.argv[1] == "set":
    heap._INTERVAL_S = 0.05
    assert heap.return_freed_memory()
before = memory_mib()
blocks = [bytearray(b"x") * 50_000 for _ in range(2000)]
for index in range(len(blocks)):
    if index % 20:
        blocks[index] = None
deadline = time.monotonic() + (30 if sys.argv[1] == "set" else 0.5)
while memory_mib() - before > 20 and time.monotonic() < deadline:
    time.sleep(0.05)
print(memory_mib() - before)
"""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)


def kept_mib(argument: str, program: str = PROGRAM) -> int:
    run = subprocess.run(
        [sys.executable, "-c", program, argument], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_memory_goes_back() -> None:
    assert kept_mib("set") < 20
    assert kept_mib("leave") > 60  # or there would be nothing to set


def test_gaps_between_what_stays_go_back() -> None:
    assert kept_mib("set", GAPS) <= 20
    assert kept_mib("leave", GAPS) > 60
