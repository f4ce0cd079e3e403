"""Exit codes, error messages and start-up of the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlc_llm.cli import doctor as doctor_module
from mlc_llm.cli.main import build_app, main
from mlc_llm.errors import DeviceError, OptionError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def failing_doctor(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function that makes `mlc_llm doctor` raise an exception."""

    def use(error: BaseException) -> None:
        def doctor() -> None:
            raise error

        monkeypatch.setattr(doctor_module, "doctor", doctor)

    return use


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OptionError("--x is 3; use 4"), 2, "error: --x is 3; use 4\n"),
        (DeviceError("no cuda here"), 1, "error: no cuda here\n"),
        (OSError(28, "No space left"), 1, "error: No space left\n"),
        (PermissionError(13, "Denied", "a.json"), 1, "error: Denied: a.json\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (EOFError("end"), 70, "internal error: EOFError: end\n"),
        (ZeroDivisionError("oh"), 70, "internal error: ZeroDivisionError: oh\n"),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_code(  # type: ignore[no-untyped-def]
    failing_doctor, capsys, error: BaseException, code: int, message: str
) -> None:
    failing_doctor(error)
    assert main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err
    assert ("MLC_LLM_DEBUG=1" in captured.err) == (code == 70)


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_the_traceback(failing_doctor, capsys, monkeypatch, way: str) -> None:  # type: ignore[no-untyped-def]
    failing_doctor(DeviceError("no cuda here"))
    if way == "variable":
        monkeypatch.setenv("MLC_LLM_DEBUG", "1")
    assert main(["--debug", "doctor"] if way == "option" else ["doctor"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no cuda here\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "--temprature", "1"], "--temprature"),
        (["chat", "--max-tokens", "many"], "--max-tokens"),
        (["conjure"], "conjure"),
        (["gen_config"], "CONFIG"),
        (["chat", "one", "two"], "two"),
    ],
)
def test_a_command_line_that_does_not_parse(arguments, words: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert "--help`)" in captured.err
    assert captured.err.count("\n") == 1


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "convert_weight" in capsys.readouterr().out


def run_program(*arguments: str, **options) -> subprocess.CompletedProcess[str]:  # type: ignore[no-untyped-def]
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(option: str) -> None:
    done = run_program("-X", "importtime", "-m", "mlc_llm", option)
    assert done.returncode == 0
    assert "mlc_llm" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mlc_llm.cli.main" in loaded
    heavy = ("tvm", "tvm_ffi", "huggingface_hub", "gguf", "numpy", "rich", "prompt_toolkit")
    assert not loaded.intersection(heavy)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["doctor", "--help"], "doctor"),
        (["--debug", "doctor", "--help"], "doctor"),
        (["chat", "-h"], "chat"),
    ],
)
def test_a_command_is_made_without_the_others(words: list[str], module: str) -> None:
    code = f"import sys, mlc_llm.cli.main as m; m.main({words}); print(*sys.modules)"
    done = run_program("-c", code)
    assert f"Usage: mlc_llm {module}" in done.stdout
    loaded = done.stdout.splitlines()[-1].split()
    assert f"mlc_llm.cli.{module}" in loaded
    others = {"mlc_llm.cli.serve", "mlc_llm.cli.bench", "mlc_llm.cli.compile", "numpy"}
    assert not others.intersection(loaded)


def test_a_misspelt_command_is_compared_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serv"]) == 2
    assert "serv" in capsys.readouterr().err
    assert [command.name for command in build_app(["chat"]).registered_commands] == ["chat"]
    both = [command.name for command in build_app(["bench", "serve"]).registered_commands]
    assert sorted(both, key=str) == ["bench", "bench serve"]
    every = {command.name for command in build_app().registered_commands}
    assert {command.name for command in build_app(["serv"]).registered_commands} == every
    assert {"chat", "serve", "bench", "bench serve"} < every


def test_a_reader_that_leaves_ends_the_program_quietly() -> None:
    code = (
        "import sys\n"
        "from mlc_llm.cli import doctor as module, main as m\n"
        "def doctor():\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "module.doctor = doctor\n"
        "sys.exit(m.main(['doctor']))\n"
    )
    command = f'{sys.executable} -c "$CODE" | head -n 1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CODE": code},
    )
    assert done.stdout.splitlines() == ["x" * 100, "141"]
    assert done.stderr == ""
