"""What `doctor` finds, and that it says how to mend it."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest

from mlc_llm.cli import diagnosis
from mlc_llm.cli.diagnosis import Finding, examine
from mlc_llm.cli.main import main

REQUIREMENTS = ["apache-tvm==0.27.0.post1", "numpy>=1.26", 'pytest>=8; extra == "dev"']
INSTALLED = {"apache-tvm": "0.27.0.post1", "numpy": "2.0.0"}


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installation as it should be, with an empty cache."""

    def version(name: str) -> str:
        if name not in INSTALLED:
            raise importlib.metadata.PackageNotFoundError(name)
        return INSTALLED[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(diagnosis, "_try_runtime", lambda: (2, None))
    monkeypatch.setattr(diagnosis, "_LOW_DISK_BYTES", 0)
    monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path / "home"))
    for name in ("MLC_JIT_POLICY", "MLC_DOWNLOAD_CACHE_POLICY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def problems(**variables: str) -> list[str]:
    found = examine({**os.environ, **variables})
    return [finding.problem for finding in found if finding.problem is not None]


def value_of(name: str) -> str:
    return next(finding.value for finding in examine(os.environ) if finding.name == name)


def test_a_healthy_machine_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for words in ("apache-tvm: 0.27.0.post1", "cpu: found", "nothing there yet", "free disk"):
        assert words in captured.out
    assert "PROBLEM" not in captured.out


def test_it_changes_nothing(tmp_path: Path) -> None:
    assert main(["doctor"]) == 0
    assert not (tmp_path / "home").exists()


def test_a_wrong_version_is_a_problem(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(INSTALLED, "apache-tvm", "0.26.0")
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "works with 0.27.0.post1 only; run `pip install 'apache-tvm==0.27" in captured.out
    assert captured.err == "error: 1 problem found: see above how to mend what is wrong\n"


def test_a_missing_package_is_a_problem(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delitem(INSTALLED, "numpy")
    assert problems() == ["numpy is missing; run `pip install 'numpy>=1.26'`"]


def test_bad_settings_are_problems(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert "MLC_JIT_POLICY is 'MAYBE'" in problems(MLC_JIT_POLICY="MAYBE")[0]
    assert "HF_ENDPOINT is 'mirror'" in problems(HF_ENDPOINT="mirror")[0]
    monkeypatch.setattr(diagnosis, "_LOW_DISK_BYTES", 10**18)
    assert "free some space" in problems()[0]
    (tmp_path / "file").touch()
    unusable = problems(MLC_LLM_HOME=str(tmp_path / "file" / "home"))
    assert any("cannot be written" in problem for problem in unusable)


def test_caches_are_listed_with_their_sizes(tmp_path: Path) -> None:
    library = tmp_path / "home" / "model_lib" / "llama-q0f32"
    library.mkdir(parents=True)
    (library / "lib0.o").write_bytes(b"x" * 1500)
    assert value_of("library llama-q0f32") == "1.5 kB"
    assert value_of("directory").endswith("(1.5 kB)")


def test_a_token_is_never_shown(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "HF_TOKEN: set" in out
    assert "hf_secret" not in out


def test_the_report_comes_as_json_too(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(diagnosis, "_try_runtime", lambda: (0, "it does not load"))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    expected = Finding("Runtime and tools", "TVM runtime", "broken", "it does not load")
    assert vars(expected) in report["findings"]


def test_no_linker_is_no_problem(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", "")
    assert problems() == []
    assert "chat does without" in value_of("linker")


def test_the_runtime_is_tried_for_real(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.undo()
    num_threads, problem = diagnosis._try_runtime()
    assert problem is None
    assert num_threads >= 1
    monkeypatch.setattr(diagnosis.sys, "executable", shutil.which("false"))
    assert "does not load (exit status 1)" in str(diagnosis._try_runtime()[1])
