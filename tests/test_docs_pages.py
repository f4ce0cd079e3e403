"""Pages for people name files, functions and tests that exist."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_FOLDERS = ("mlc_llm", "tests", "scripts", "docs", "benchmarks")
_SPAN = re.compile(r"`([^`\n]+)`")


def named_paths(text: str) -> list[str]:
    """Return what looks like a path of this repository, in sentences and in commands."""
    found = re.findall(rf"(?<![\w./-])(?:{'|'.join(_FOLDERS)})/[\w./-]+", text)
    return [path.rstrip("./") for path in found]


def package_paths(text: str) -> list[str]:
    """Return what is written as code and ends like a file inside the package."""
    return [span for span in _SPAN.findall(text) if re.fullmatch(r"[\w/]+/\w+\.py", span)]


def defined_names(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [path for path in named_paths(text) if not list(ROOT.glob(path))]
    places = (ROOT, ROOT / "mlc_llm")
    assert not [
        path
        for path in package_paths(text)
        if not any((place / path).is_file() for place in places)
    ]


def test_every_layer_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "mlc_llm"
    layers = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert not {layer for layer in layers if f"`{layer}`" not in text and f"{layer}/" not in text}


def test_the_architecture_names_every_argument_of_the_library() -> None:
    from mlc_llm.models.base import CausalLM

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for entry in (CausalLM.forward, CausalLM.sample):
        row = re.search(rf"^\| `{entry.__name__}` \|.*$", text, re.MULTILINE)
        assert row is not None
        names = set(inspect.signature(entry).parameters) - {"self"}
        assert not {name for name in names if not re.search(rf"\b{name}\b", row[0])}


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_quoted_code_is_that_of_the_families() -> None:
    families = ROOT / "mlc_llm" / "models"
    sources = [(families / name).read_text() for name in ("mistral.py", "qwen2.py")]
    assert len(blocks("python")) == 3
    for block in blocks("python"):
        lines = [line for line in block.splitlines() if line.strip()]
        assert any(all(line in source.splitlines() for line in lines) for source in sources)


def test_quoted_reference_is_a_stored_one() -> None:
    cases = json.loads((TESTS / "references" / "cases.json").read_text())
    quoted = [json.loads(block) for block in blocks("json")]
    assert len(quoted) == 1 and quoted[0] in cases


def test_acceptance_table_names_tests_that_exist() -> None:
    text = (TESTS / "acceptance" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    assert not [name for name in named if name[1] not in defined_names(TESTS / name[0])]
