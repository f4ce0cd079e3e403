"""Progress as lines and as bars."""

import io

import pytest

from mlc_llm.cli import progress
from mlc_llm.cli.progress import format_amount, format_size, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    with show_progress(stream) as lines:
        lines.start("Converting", 3, "tensors")
        for _ in range(3):
            lines.advance(1)
        lines.finish()
        lines.message("a note")
    assert stream.getvalue() == "Converting ...\nConverting: 3/3 tensors\na note\n"


def test_a_log_hears_of_long_work_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with show_progress(stream) as lines:
        lines.start("Downloading", 100, "B")
        for _ in range(11):
            now[0] += 1
            lines.advance(5)
        lines.advance(-30)
        lines.finish()
    assert stream.getvalue().splitlines() == [
        "Downloading ...",
        "Downloading: 25 bytes/100 bytes",
        "Downloading: 50 bytes/100 bytes",
        "Downloading: 25 bytes/100 bytes",
    ]


def test_a_terminal_gets_bars_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with show_progress(stream) as bars:
        bars.start("Converting", 2, "tensors")
        bars.advance(2)
        bars.message("a [note]")
        bars.finish()
        bars.start("Compiling", None, "")
        bars.finish()
    text = stream.getvalue()
    assert "2/2 tensors" in text
    assert "a [note]" in text
    assert "Compiling" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # cursor hidden, shown


def test_a_stage_that_breaks_off_leaves_the_terminal_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(ValueError, match="broken"), show_progress(stream) as bars:
        bars.start("Converting", 2, "tensors")
        raise ValueError("broken")
    assert stream.getvalue().endswith("\x1b[?25h")


def test_amounts_are_readable() -> None:
    assert format_size(999) == "999 bytes"
    assert format_size(98_200_000) == "98.2 MB"
    assert format_size(5 * 10**15) == "5000.0 TB"
    assert format_amount(1000, None, "tensors") == "1,000 tensors"
    assert format_amount(10**9, 2 * 10**9, "bytes") == "1.0 GB/2.0 GB"
