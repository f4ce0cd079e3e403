"""Runs the checks of a client and prints what came of each as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence


def run_checks(checks: Sequence[Callable[[], None]]) -> None:
    """Run every check, whatever the others did."""
    for check in checks:
        problem = None
        try:
            check()
        except Exception as error:  # every failure is a result
            problem = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps({"check": check.__name__, "problem": problem}), flush=True)
