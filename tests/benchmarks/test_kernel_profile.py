"""The profiler of kernels: it runs from the command line, and its figures add up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "stories260K"
NUM_LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 5, 64, 172, 512

_KERNEL = re.compile(
    r"^(?P<name>[a-z]\w+) +(?P<out>[\dx]+) +(?P<calls>\d+) +(?P<us>[\d.]+) +(?P<ms>[\d.]+) "
    r"+(?P<share>[\d.]+)% +(?P<gb_s>[\d.]+) *(?P<gop_s>\d+)? *$"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "profile_kernels.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def kernels_of(section: str) -> list[dict[str, str]]:
    return [found.groupdict() for line in section.splitlines() if (found := _KERNEL.match(line))]


@pytest.mark.cpu
def test_tables_of_a_model() -> None:
    done = run(
        *(str(MODEL), "--quantization", "q0f32", "--no-machine", "--threads", "1"),
        *("--repeats", "3", "--decode", "1", "2", "--prefill", "20", "--context", "7"),
    )
    assert done.returncode == 0, done.stderr
    head, *sections = done.stdout.split("\n\n")
    assert "q0f32" in head and "1 threads" in head
    titles = ["decode step, 1 sequences after 7 tokens", "decode step, 2 sequences after 7 tokens",
              "prefill of 20 tokens"]  # fmt: skip
    assert [section.splitlines()[0] for section in sections] == titles
    for section, rows in zip(sections, (1, 2, 20), strict=True):
        kernels = kernels_of(section)
        shapes = {kernel["out"]: int(kernel["calls"]) for kernel in kernels
                  if kernel["name"].startswith("linear")}  # fmt: skip
        assert shapes[f"{rows}x{2 * INTERMEDIATE}"] == NUM_LAYERS
        logits = next(kernel for kernel in kernels if kernel["out"].endswith(f"x{VOCAB}"))
        assert int(logits["calls"]) == 1
        # Weights, input and output of the output layer, in the time of its call.
        num_rows = int(logits["out"].split("x")[0])
        moved = 4 * (VOCAB * HIDDEN + num_rows * (HIDDEN + VOCAB))
        expected = moved / float(logits["us"]) / 1e3
        assert float(logits["gb_s"]) == pytest.approx(expected, rel=0.1, abs=0.1)
        total = float(re.search(r"^sum +([\d.]+)", section, re.M)[1])
        machine = float(re.search(r"^virtual machine, \d+ calls +([\d.]+)", section, re.M)[1])
        # Every figure is rounded; kernels beyond the table's length are not in these lines.
        assert sum(float(kernel["ms"]) for kernel in kernels) <= total - machine + 0.02
        assert sum(float(kernel["share"]) for kernel in kernels) <= 100
        assert re.search(r"^step [\d.]+ ms without the clock", section, re.M)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_shape"], "neither a shape (smollm2_135m"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--decode", "1", "0"], "--decode must be at least 1"),
    ],
)
def test_what_cannot_be_profiled(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
