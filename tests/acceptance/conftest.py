"""The program with one cache for all acceptance tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from program import Program


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The command line; what it made is removed at the end, as it may be large."""
    home = tmp_path_factory.mktemp("home")
    yield Program(home)
    shutil.rmtree(home)
