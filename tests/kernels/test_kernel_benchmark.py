"""The benchmark of kernels: it runs from the command line, and its figures add up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.cpu


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lines_of_a_linear_layer() -> None:
    table = run("--only", "1024x512, ", "--shape", "1024x512", "--rows", "1", "5", "--threads", "1")
    assert ", 1 threads, code for cpu: " in table.splitlines()[0]
    lines = re.findall(
        r"^int8 1024x512, 4 bits, (\d) rows +([\d.]+) +([\d.]+) +(\d+)$", table, re.M
    )
    assert [line[0] for line in lines] == ["1", "5"]
    for rows, microseconds, _, rate in lines:
        operations = 2 * int(rows) * 1024 * 512
        assert float(rate) == pytest.approx(operations / float(microseconds) / 1e3, rel=0.2, abs=1)


def test_prefetch_distances_are_compared() -> None:
    wanted = ("--only", "prefetch", "--shape", "16x32", "--rows", "1", "--bits", "8")
    table = run(*wanted, "--prefetch", "0", "4096")
    found = re.findall(r"^int8 16x32, 8 bits, prefetch (\d+), 1 rows", table, re.M)
    assert found == ["0", "4096"]
