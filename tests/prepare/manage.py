"""Running command lines in a test, with what they printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., "Result"]


class Result:
    """What a command line printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the content of each file, as a hub publishes it."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def directories(base: Path) -> list[str]:
    """Return the names in a directory of the cache, records and locks left out."""
    return sorted(path.name for path in base.glob("*") if not path.name.startswith("."))
