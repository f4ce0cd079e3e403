"""The Makefile: quoting of PROMPT, and that a second run does no work twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def install_fake_venv(venv: Path) -> None:
    """Make a virtual environment that is up to date and whose mlc_llm prints its arguments."""
    program = venv / "bin" / "mlc_llm"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "<%s>" "$word"; done\necho\n')
    program.chmod(0o755)
    for stamp in (".installed", ".installed-dev"):
        (venv / stamp).touch()


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environment, **variables},
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the capital of France?",
        'it\'s "quoted" & $HOME `id` $(id); \\ * # é',
        "two\nlines",
        "$(shell touch pwned) $$ %",
    ],
)
def test_any_prompt_arrives_as_it_is(tmp_path: Path, prompt: str) -> None:
    install_fake_venv(tmp_path / "venv")
    done = make("demo", f"VENV={tmp_path / 'venv'}", f"PROMPT={prompt}")
    assert done.stderr == ""
    assert done.stdout == f"<demo-model>\n<chat><--prompt><{prompt}>\n"
    assert not (ROOT / "pwned").exists()


def test_without_a_prompt_the_chat_opens(tmp_path: Path) -> None:
    install_fake_venv(tmp_path / "venv")
    done = make("demo", f"VENV={tmp_path / 'venv'}", PROMPT="$P$G")
    assert done.stdout == "<demo-model>\n<chat>\n"


def test_an_old_interpreter_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "3.10 or newer" >&2\nexit 1\n')
    python.chmod(0o755)
    done = make("demo-model", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode != 0
    assert "3.10 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_help_names_every_target() -> None:
    done = make("help")
    for target in ("demo", "test", "check", "demo-model", "clean"):
        assert f"make {target} " in done.stdout


def test_the_demo_model_is_among_the_tests_of_browsers(tmp_path: Path) -> None:
    install_fake_venv(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --collect-only -q\n')
    python.chmod(0o755)
    done = make("browser", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("demo_in_browser.py::test_answers_are_those_of_the_cpu", "test_web_llm.py::"):
        assert f"tests/browser/{name}" in done.stdout
