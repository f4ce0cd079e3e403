"""Reads blocks of calls out of an answer's text; what turns out to be no call stays text.

A format's reader is a generator that is sent the characters after a marker, one by one. It tells
a `CallWriter` what it finds and ends with the block's last character; it raises NotACall at a
character that fits no call, which is then looked at again as text. Nothing is read twice, so the
work is linear in the text, whatever it is.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeAlias

from mlc_llm.text.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    join_events,
)

MAX_CALLS = 128
_SLICE = 256  # characters that are searched for markers at a time
_ALPHABET = string.ascii_letters + string.digits

Reading: TypeAlias = Generator[None, str, Any]
Reader: TypeAlias = "Callable[[str, CallWriter], Reading]"


class NotACall(Exception):
    """What came does not belong to a call; inside of parsers only."""


def new_call_id(length: int = 24, prefix: str = "call_") -> str:
    """Return an id that no other call has."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


class Markers:
    """Texts to look for in a text that comes in pieces."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._longest = max(map(len, self._markers), default=1)

    def find(self, text: str) -> tuple[int, str]:
        """Return place and text of the first marker, the longest of those that begin there.

        The length of the text and "" where there is none.
        """
        found, marker = len(text), ""
        for candidate in self._markers:
            place = text.find(candidate, 0, found + len(candidate))
            if 0 <= place < found or (place == found and len(candidate) > len(marker)):
                found, marker = place, candidate
        return found, marker

    def num_begun(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a marker."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(marker.startswith(end) for marker in self._markers):
                return length
        return 0


class CallWriter:
    """Makes events of what a reader finds.

    holds_calls: tell of a call when it is whole, so that one which breaks off becomes content;
    otherwise as soon as its arguments begin. Space around calls is left out.
    """

    def __init__(
        self, tools: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str], holds_calls: bool
    ) -> None:
        self.tools = tools
        self.events: list[Event] = []
        # Characters that no event stands for yet.
        self.raw: list[str] = []
        self.has_text = False
        self._new_id = new_id
        self._holds_calls = holds_calls
        self._num_calls = 0
        self._spaces: list[str] = []
        self._pending: list[Event] = []
        self._is_open = False
        self._is_whole = False

    def check(self, name: str) -> None:
        """Raise NotACall unless there is a tool of this name, and room for a call."""
        if name not in self.tools or self._num_calls >= MAX_CALLS:
            raise NotACall

    def start(self, name: str) -> None:
        """Begin a call. Raises NotACall as `check` does."""
        self.check(name)
        self._is_open = True
        self._pending = [CallStart(self._num_calls, self._new_id(), name)]
        self._pass()

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun."""
        self._pending.append(CallArguments(self._num_calls, text))
        self._pass()

    def arguments_end(self) -> None:
        """Note that name and arguments are there: only the call's closing is still to come."""
        self._is_whole = True

    def end(self) -> None:
        """End the call that was begun."""
        self._pending.append(CallEnd(self._num_calls))
        self._is_open = self._is_whole = False
        self._flush()
        self._num_calls += 1

    def accept(self) -> None:
        """Note that what was read since the last call belongs to the calls: it is no content."""
        self.raw.clear()

    def text(self, text: str) -> None:
        """Add content."""
        stripped = text.rstrip()
        if stripped:
            self.has_text = True
            self.events.append(Content("".join(self._spaces) + stripped))
            self._spaces = []
        if len(stripped) < len(text):
            self._spaces.append(text[len(stripped) :])

    def abandon(self) -> None:
        """Make content of what no event stands for."""
        if self._is_open and not self._holds_calls:
            self._num_calls += 1  # it was told of, so its index is taken
        self._is_open = self._is_whole = False
        self._pending = []
        text = "".join(self.raw)
        self.raw.clear()
        self.text(text)

    def finish(self) -> None:
        """End the answer, and with it a call that is whole but for its closing."""
        if self._is_open and self._is_whole:
            self.end()
        self.abandon()
        if self._num_calls == 0:
            self.events.append(Content("".join(self._spaces)))
        self._spaces = []

    def take_events(self) -> list[Event]:
        """Return the events since the last time."""
        events, self.events = join_events(self.events), []
        return events

    def _pass(self) -> None:
        if not self._holds_calls:
            self._flush()

    def _flush(self) -> None:
        self.events += self._pending
        self._pending = []
        self._spaces = []
        self.raw.clear()


class CallParser:
    """Tells the calls in an answer from its content; an `AnswerParser`."""

    def __init__(
        self,
        markers: Sequence[str],
        read: Reader,
        tools: Mapping[str, Mapping[str, Any]],
        *,
        starts_bare: bool = False,
        holds_calls: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Read blocks that begin with one of the markers.

        starts_bare: one also begins where an answer begins with a bracket; the reader then is
        given "" as the marker and the bracket as its first character. tools: the schemas of
        their arguments, by their names.
        """
        self._markers = Markers(markers)
        self._read = read
        self._starts_bare = starts_bare
        self._writer = CallWriter(tools, new_id, holds_calls)
        self._block: Reading | None = None
        self._tail = ""  # the end of the text that may be the beginning of a marker

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is now sure."""
        for start in range(0, len(text), _SLICE):
            self._take(text[start : start + _SLICE])
        return self._writer.take_events()

    def finish(self) -> list[Event]:
        """Return what was held back, now that no text comes any more."""
        if self._block is not None:
            self._block.close()
            self._block = None
        tail, self._tail = self._tail, ""
        self._writer.raw.append(tail)
        self._writer.finish()
        return self._writer.take_events()

    def _take(self, text: str) -> None:
        place = 0
        while place < len(text):
            if self._block is None:
                text, place = self._tail + text[place:], 0
                self._tail = ""
                place = self._seek(text)
            else:
                place = self._feed_block(text, place)

    def _seek(self, text: str) -> int:
        """Pass content on up to a block; return where that begins to be read."""
        writer = self._writer
        if self._starts_bare and not writer.has_text:
            bare = len(text) - len(text.lstrip())
            if bare < len(text) and text[bare] in "{[":
                writer.text(text[:bare])
                self._open("")
                return bare
        found, marker = self._markers.find(text)
        if marker:
            writer.text(text[:found])
            self._open(marker)
            return found + len(marker)
        kept = self._markers.num_begun(text)
        writer.text(text[: len(text) - kept])
        self._tail = text[len(text) - kept :]
        return len(text)

    def _open(self, marker: str) -> None:
        # Once there was a block, a bracket is no longer the beginning of the answer.
        self._writer.has_text = True
        self._writer.raw.append(marker)
        self._block = self._read(marker, self._writer)
        next(self._block)

    def _feed_block(self, text: str, place: int) -> int:
        assert self._block is not None
        raw = self._writer.raw
        send = self._block.send
        for number in range(place, len(text)):
            raw.append(text[number])
            try:
                send(text[number])
            except StopIteration:
                raw.clear()
                self._block = None
                return number + 1
            except NotACall:
                if raw:  # the character is read again, as text
                    raw.pop()
                self._writer.abandon()
                self._block = None
                return number
        return len(text)
