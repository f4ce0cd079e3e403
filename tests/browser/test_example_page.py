"""The page of examples/web, with what `mlc_llm package` makes, in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from in_chromium import Browser

from mlc_llm.cli.main import main

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(1500)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "web"
QUESTION = "Once upon a time"


@pytest.fixture(scope="module")
def used(browser: Browser, stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the page showed to somebody who used it."""
    site = tmp_path_factory.mktemp("site")
    for path in EXAMPLE.iterdir():
        if path.is_file():
            shutil.copy(path, site)
    os.symlink(browser.modules, site / "node_modules")
    config = json.loads((EXAMPLE / "mlc-package-config.json").read_text())
    entry = {**config["model_list"][0], "model": str(stories260k), "model_id": "stories"}
    # Not the size that any model has by itself: the library and the page must agree on it.
    entry["overrides"] = {"context_window_size": 384}
    own = site / "own-config.json"
    own.write_text(json.dumps({**config, "model_list": [entry]}))
    command = ["package", "--package-config", str(own), "--output", str(site / "dist")]
    assert main(command) == 0
    return browser.run("use_page.mjs", {"site": str(site), "question": QUESTION}, 1200)


def test_answers_stream_and_stop(used: Any) -> None:
    online = used["online"]
    assert online["answer"].startswith(online["early"])
    # A story goes on until the context is full, which is more than this.
    assert 4 < len(online["answer"].split()) < 200
    assert online["canStop"] is False


def test_downloads_are_shown(used: Any) -> None:
    shown = [bar for bar, _ in used["stages"]]
    assert len(shown) > 2 and shown[-1] == 1
    assert any("Fetching param cache" in text for _, text in used["stages"])


def test_the_page_works_without_a_network(used: Any) -> None:
    assert used["askedOffline"] == []
    assert len(used["offline"]["answer"].split()) > 4


@pytest.mark.parametrize(
    ("case", "words"),
    [("without", "has no WebGPU"), ("empty", "found no graphics card")],
)
def test_without_webgpu_the_page_says_what_to_do(used: Any, case: str, words: str) -> None:
    said = used[case]["said"]
    assert words in said and "Chrome or Edge 113" in said and "chrome://flags" in said
    assert used[case]["isReady"] is False


def test_the_page_asks_for_the_same_release_as_the_tests(browser: Browser) -> None:
    here = json.loads((Path(__file__).parent / "package.json").read_text())["dependencies"]
    page = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    assert page == {"@mlc-ai/web-llm": here["@mlc-ai/web-llm"]}
