"""How an answer is written while it is made: itself to stdout, the thoughts before it to stderr.

Knows what a terminal can show. Not who answers.
"""

from __future__ import annotations

import os
import sys

from mlc_llm.text.events import Content, Reasoning

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_BEGIN, _END = "[thoughts]\n", "[end of thoughts]\n"


def is_terminal() -> bool:
    """Say whether both the answer and what is beside it go to a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class AnswerPrinter:
    """Prints one answer; thoughts are dimmed where the terminal can do that, else marked."""

    def __init__(self, shows_thoughts: bool) -> None:
        self._shows_thoughts = shows_thoughts
        is_dim = sys.stderr.isatty() and _has_styles()
        self._begin, self._end = (_DIM, _PLAIN) if is_dim else (_BEGIN, _END)
        self._is_thinking = False
        # Whether the last line of each is begun and not ended.
        self._breaks_answer = self._breaks_thoughts = False

    def put(self, piece: Content | Reasoning) -> None:
        """Print a piece."""
        if isinstance(piece, Reasoning):
            if self._shows_thoughts:
                self._think(piece.text)
            return
        self._end_thoughts()
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        self._breaks_answer = not piece.text.endswith("\n")

    def finish(self) -> None:
        """End what is begun; an answer ends with a line break."""
        self._end_thoughts()
        sys.stdout.write("\n" if self._breaks_answer else "")
        sys.stdout.flush()

    def _think(self, text: str) -> None:
        if not self._is_thinking:
            self._is_thinking = True
            sys.stderr.write(("\n" if self._breaks_answer else "") + self._begin)
        sys.stderr.write(text)
        sys.stderr.flush()
        self._breaks_thoughts = not text.endswith("\n")

    def _end_thoughts(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            sys.stderr.write(("\n" if self._breaks_thoughts else "") + self._end)
            sys.stderr.flush()


def _has_styles() -> bool:
    return os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
