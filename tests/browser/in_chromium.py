"""Headless Chromium, driven by node programs of this directory."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
Calls = list[dict[str, Any]]


def find_programs() -> tuple[dict[str, str], str | None]:
    """Return the programs by name, and why something is missing, None where nothing is."""
    found = {name: shutil.which(name) for name in ("emcc", "node", "npm")}
    found["chromium"] = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    packages = {"emcc": "emscripten", "node": "npm", "npm": "npm", "chromium": "chromium"}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        return {}, f"{missing[0]} is not installed; `apt-get install {packages[missing[0]]}`"
    return {name: str(path) for name, path in found.items()}, None


class Browser:
    """Asks models in a browser. modules: a node_modules directory of package.json here."""

    def __init__(self, node: str, chromium: str, modules: Path) -> None:
        self.modules = modules
        self._node, self._chromium = node, chromium

    def run(self, program: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a program of this directory and return what it printed last."""
        command = [self._node, str(HERE / program), str(self.modules), self._chromium]
        done = subprocess.run(
            [*command, json.dumps(request)], capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, done.stderr[-2000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert "error" not in result, f"{result['error']}\n{done.stderr[-2000:]}"
        return result

    def ask(self, model: Path, calls: Calls, timeout_s: float = 1200) -> list[dict[str, Any]]:
        """Return the answers of a model, a directory with `model.wasm`, to calls."""
        request = {"model": str(model), "calls": calls}
        answers: list[dict[str, Any]] = self.run("ask_in_browser.mjs", request, timeout_s)[
            "answers"
        ]
        return answers
