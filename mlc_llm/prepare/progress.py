"""How long work tells about itself: one stage at a time, counted in a unit.

Knows neither terminals nor what is counted; `cli` draws it.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives stages of long work, one after the other.

    A stage that breaks off by an exception is not finished; a later `start` replaces it.
    """

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage of `total` units (None: unknown); unit "bytes" means bytes."""

    def advance(self, n: int) -> None:
        """Count n more units; negative where work has to be done again."""

    def finish(self) -> None:
        """End the stage: all of it is done."""

    def message(self, text: str) -> None:
        """Tell the user one line, inside or outside a stage."""


class NullProgress:
    """Tells nobody."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage."""

    def advance(self, n: int) -> None:
        """Count units."""

    def finish(self) -> None:
        """End the stage."""

    def message(self, text: str) -> None:
        """Tell a line."""
