"""`scripts/check test`: what failed runs once more, and nothing else does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / "scripts" / "check"
# An interpreter that notes what it was to run and ends with the next of the given statuses.
FAKE = """#!/usr/bin/env bash
echo "$@" >> calls
read -r status rest < statuses
echo "$rest" > statuses
exit "$status"
"""


def run_tests(folder: Path, *statuses: int) -> tuple[int, list[str]]:
    """Run the script with an interpreter of these exit statuses; return its own and the calls."""
    python = folder / "python"
    python.write_text(FAKE.replace("calls", f"{folder}/calls").replace(" statuses", f" {folder}/s"))
    python.chmod(0o755)
    (folder / "s").write_text(" ".join(map(str, statuses)) + "\n")
    found = subprocess.run(
        [CHECK, "test"], env=os.environ | {"PYTHON": str(python)}, capture_output=True, timeout=60
    )
    return found.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("statuses", "expected", "is_run_again"),
    [
        ((0, 0), 0, False),
        ((1, 0, 0), 0, True),
        ((0, 1, 0), 0, True),
        ((1, 1, 1), 1, True),
        ((0, 2), 2, False),
        ((1, 4), 4, False),
        ((3, 1), 3, False),
        ((5, 0), 5, False),
    ],
)
def test_only_failed_tests_run_again(
    tmp_path: Path, statuses: tuple[int, ...], expected: int, is_run_again: bool
) -> None:
    status, calls = run_tests(tmp_path, *statuses)
    assert status == expected
    assert len(calls) == 2 + is_run_again
    assert [call for call in calls if "--last-failed" in call] == calls[2:]
