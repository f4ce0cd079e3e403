"""The measurement of compile times runs, and says what failed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cpu
def test_table_of_devices() -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "compile_devices.py"), "--layers", "1"),
            *("--device", "webgpu", "--device", "nothing"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    *_, webgpu, nothing = done.stdout.splitlines()
    found = re.fullmatch(r"\| webgpu \| ([\d.]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|", webgpu)
    assert found and all(float(figure) > 0 for figure in found.groups())
    assert nothing == "| nothing | failed |" and "'nothing' is not known" in done.stderr
    assert done.returncode == 1
