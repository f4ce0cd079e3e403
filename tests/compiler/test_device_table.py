"""The table of docs/devices.md is current, and stands on tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mlc_llm.compiler.gpu_targets import _GPUS
from mlc_llm.prepare.package_config import PACKAGE_DEVICES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = ROOT / "scripts" / "device_table.py"
    spec = importlib.util.spec_from_file_location("device_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(table: ModuleType) -> None:
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    assert page == table.render_page(page), "run `python scripts/device_table.py`"


def test_every_named_test_exists(table: ModuleType) -> None:
    defined: dict[str, set[str]] = {}
    names = table.named_tests()
    assert len(names) > 20
    for file, _, name in (test.partition("::") for test in names):
        if file not in defined:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            defined[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert name in defined[file], f"{file}::{name}"
        assert name.startswith("test_")


def test_what_is_done_is_shown(table: ModuleType) -> None:
    """A cell that claims something names a test; what is not done says so in words."""
    for row in table.ROWS:
        for cell in row[2:]:
            claims = not cell.text.startswith(("no", "needs"))
            assert claims == bool(cell.tests), (row.device, cell)


def test_every_device_has_a_row(table: ModuleType) -> None:
    named = " ".join(row.device for row in table.ROWS)
    for device in (*_GPUS, *PACKAGE_DEVICES, "cpu", "aarch64", "riscv64", "wasm32"):
        assert f"`{device}" in named, device
