"""docs/models.md is what the registry and the stored references say now."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from mlc_llm.models.registry import FAMILIES
from mlc_llm.quantization.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "model_table", ROOT / "scripts" / "model_table.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(table: ModuleType) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == table.render_page(), "run `python scripts/model_table.py`"


def test_the_page_has_every_family_and_quantization(table: ModuleType) -> None:
    text = table.render_page()
    rows = re.findall(r"^\| `([\w.-]+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(FAMILIES)
    assert all(f"`{name}`" in text for name in SCHEMES)


def test_references_stand_with_their_family(table: ModuleType) -> None:
    lines = table.render_page().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert "`qwen2_gqa`" in rows["`qwen2`"] and "`llama_gqa`" in rows["`llama`"]
    assert "`llama_gqa`" not in rows["`qwen2`"]


def test_the_table_says_what_computed_the_references(table: ModuleType) -> None:
    lines = table.render_page().splitlines()
    rows = {line.split("|")[1].strip(): line.split("|") for line in lines if line.startswith("|")}
    computed_by = {name.strip("`"): cells[5].strip() for name, cells in rows.items()}
    assert computed_by["llama"] == "transformers"
    assert computed_by["orion"] == "transformers, as `stablelm`"
    assert computed_by["rwkv5"] == "`rwkv 0.8.32`"
    assert rows["`phi-msft`"][4].strip() == "`phi`, renamed"
    # Whatever has a type of its own in cases.json is not what transformers calls the family.
    for case in json.loads((ROOT / "tests" / "references" / "cases.json").read_text()):
        if other := case.get("transformers_type"):
            assert f"as `{other}`" in computed_by[case["model_type"]]
