"""The browser that tests of this directory share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from in_chromium import HERE, Browser, find_programs


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    programs, missing = find_programs()
    if missing is not None:
        pytest.skip(missing)
    modules = HERE / "node_modules"
    if not modules.is_dir():
        place = tmp_path_factory.mktemp("npm")
        shutil.copy(HERE / "package.json", place)
        install = [programs["npm"], "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(install, cwd=place, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            pytest.skip(f"npm cannot install the packages of {HERE / 'package.json'}")
        modules = place / "node_modules"
    return Browser(programs["node"], programs["chromium"], Path(modules))
