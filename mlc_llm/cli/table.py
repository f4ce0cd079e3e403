"""Tables, times and sizes for people, on a terminal or in a pipe.

In a pipe every row is one line, whatever its length; on a terminal that is too narrow, a long first
column gets a line of its own instead of being cut, so that names can be copied.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Sequence

_GAP = "  "
_STEPS = ((60, "s"), (60, "min"), (24, "h"))


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> None:
    """Print rows under headers; columns named in `right` hold numbers and are aligned so."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in render_table(headers, rows, right, width):
        print(line)


def render_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] = (),
    width: int | None = None,
) -> list[str]:
    """Return the lines of a table, at most `width` characters long where that is possible."""
    table = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers))]
    rest = sum(widths[1:]) + len(_GAP) * (len(headers) - 1)
    is_narrow = width is not None and widths[0] + rest > width
    if is_narrow and width is not None:
        widths[0] = max(len(headers[0]), width - rest)
    lines = []
    for row in table:
        cells = [
            cell.rjust(widths[column]) if headers[column] in right else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ]
        if is_narrow and len(row[0]) > widths[0]:
            lines.append(row[0])
            cells[0] = " " * widths[0]
        lines.append(_GAP.join(cells).rstrip())
    return lines


def format_duration(seconds: float) -> str:
    """Return a length of time in its largest whole unit: `45 s`, `12 min`, `3 h`, `20 d`."""
    value = max(0.0, seconds)
    for step, unit in _STEPS:
        if value < step:
            return f"{value:.0f} {unit}"
        value /= step
    return f"{value:.0f} d"


def format_age(moment: float | None, now: float | None = None) -> str:
    """Return how long ago a moment was, in seconds since 1970; `never` for None."""
    if moment is None:
        return "never"
    return f"{format_duration((time.time() if now is None else now) - moment)} ago"
