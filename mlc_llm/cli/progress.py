"""Progress on the terminal: bars where a person watches, plain lines where a log does.

Implements `prepare.progress.Progress` twice. Everything goes to stderr; nothing is imported or
printed until there is something to show.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mlc_llm.prepare.progress import Progress

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield bars if `stream` (default stderr) is a terminal, lines otherwise."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield LineProgress(stream)
        return
    bars = BarProgress(stream)
    try:
        yield bars
    finally:
        bars.close()


class LineProgress:
    """One line when a stage starts, one every few seconds, one when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._unit = ""
        self._total: int | None = None
        self._done = 0
        self._printed_at = 0.0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage of `total` units; None where the amount is not known."""
        self._stage, self._total, self._unit = stage, total, unit
        self._done = 0
        self._printed_at = time.monotonic()
        self._print(f"{stage} ...")

    def advance(self, n: int) -> None:
        """Count `n` more units; negative where work has to be done again."""
        self._done += n
        now = time.monotonic()
        if now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._printed_at = now
            self._print(f"{self._stage}: {self._amount()}")

    def finish(self) -> None:
        """End the stage, done or not."""
        if self._total is not None or self._done:
            self._print(f"{self._stage}: {self._amount()}")

    def message(self, text: str) -> None:
        """Print a line of text."""
        self._print(text)

    def _amount(self) -> str:
        return format_amount(self._done, self._total, self._unit)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress:
    """A bar for the running stage, drawn by rich and left behind when the stage ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: Any = None
        self._task: Any = None
        self._stage = ""
        self._unit = ""
        self._total: int | None = None
        self._done = 0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage of `total` units; None where the amount is not known."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.close()
        self._stage, self._unit, self._total, self._done = stage, unit, total, 0
        self._bars = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=self._stream),
        )
        self._task = self._bars.add_task(stage, total=total, amount="")
        self._bars.start()

    def advance(self, n: int) -> None:
        """Count `n` more units; negative where work has to be done again."""
        if self._bars is not None:
            self._done += n
            amount = format_amount(self._done, self._total, self._unit)
            self._bars.update(self._task, completed=self._done, amount=amount)

    def finish(self) -> None:
        """End the stage, done or not; what was reached stays on the screen."""
        if self._bars is not None and self._total is None:
            # A bar without an end would stay half drawn.
            self._bars.update(self._task, visible=False)
            amount = format_amount(self._done, None, self._unit) if self._done else ""
            self.message(f"{self._stage} {amount}".rstrip())
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also where a stage broke off."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def message(self, text: str) -> None:
        """Print a line of text above the bar."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)


def format_amount(done: int, total: int | None, unit: str) -> str:
    """Return `done` of `total` in words, bytes in the unit that fits."""
    if unit in ("B", "bytes"):
        end = f"/{format_size(total)}" if total is not None else ""
        return f"{format_size(done)}{end}"
    end = f"/{total:,}" if total is not None else ""
    return f"{done:,}{end} {unit}".rstrip()


def format_size(size_bytes: int) -> str:
    """Return a size in bytes for people: `98.2 MB`, with 1 MB = 10^6 bytes."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
