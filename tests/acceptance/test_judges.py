"""How the answers of judges are read, and what fails their run; the judges run by `make judges`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from program import ROOT


@pytest.fixture(scope="module")
def judges() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("judges", ROOT / "scripts" / "judges" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["judges"] = module  # dataclasses look there for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["judges"]


def test_answers_are_read(judges: ModuleType) -> None:
    lines = 'noise\n{"check": "chat", "problem": null}\n{"check": "stop", "problem": "no"}\n'
    assert judges.read_lines(lines, 0) == {"chat": None, "stop": "no"}
    comply = [
        {"name": "Basic", "status": "passed"},
        {"name": "Tools", "status": "failed", "errors": ["a", "b", "c"]},
        {"name": "Reasoning", "status": "skipped"},
    ]
    assert judges.read_llm_comply("note\n" + json.dumps({"results": comply}), 1) == {
        "Basic": None,
        "Tools": "a; b",
    }
    canary = [
        {"name": "Chat", "status": "pass"},
        {"name": "Tools", "status": "fail", "summary": "HTTP 400"},
    ]
    assert judges.read_compatcanary(json.dumps({"results": canary}), 1) == {
        "Chat": None,
        "Tools": "HTTP 400",
    }


@pytest.mark.parametrize(
    ("output", "code", "is_good"),
    [
        ("  9 generated, 9 passed\n", 0, True),
        ("  9 generated, 8 passed\n", 1, False),
        ("", 0, False),
    ],
)
def test_the_end_of_schemathesis_is_read(
    judges: ModuleType, output: str, code: int, is_good: bool
) -> None:
    [problem] = judges.read_schemathesis(output, code).values()
    assert (problem is None) == is_good


def test_what_is_not_explained_fails(
    judges: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judges, "MISSES", {("one", "tools"): "there are none"})
    assert judges.report("one", {"chat": None, "tools": "HTTP 400"}) == []
    assert "1 of 2" in (shown := capsys.readouterr().out) and "there are none" in shown
    assert judges.report("one", {"chat": "HTTP 500", "tools": "HTTP 400"}) == ["one: chat"]
    [problem] = judges.report("one", {"tools": None})
    assert "passes now" in problem
