"""A short soak of a real server, and what the soak would call a leak."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from demo_model import place_demo_model
from program import ROOT, Program

SCRIPT = ROOT / "scripts" / "soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("soak")


def test_a_leak_is_seen_and_a_peak_is_not(soak: ModuleType) -> None:
    flat = [500.0 + number % 3 for number in range(80)]
    assert soak.growth(flat) < 0.01
    assert soak.growth([*flat[:40], 900.0, *flat[41:]]) < 0.01
    assert soak.growth([500.0 + number for number in range(80)]) > 0.1
    assert soak.growth([500.0]) == 0


def test_memory_that_rises_does_not_settle(soak: ModuleType) -> None:
    rising = [300.0 + number for number in range(300)]
    assert not soak.has_settled(rising)
    assert soak.has_settled([*rising, *([600.0] * 700)])
    assert not soak.has_settled([300.0])


@pytest.mark.timeout(1000)
@pytest.mark.cpu
@pytest.mark.weights
def test_a_server_stays_as_it_was(program: Program, demo_gguf: Path) -> None:
    place_demo_model(program, demo_gguf)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--seconds", "40"],
        env=program.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("passed\n")
