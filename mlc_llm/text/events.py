"""What the text of an answer turns out to be, piece by piece: thoughts, content, calls of tools.

Plain data that knows no protocol: chats, responses and messages all are written from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of a tool begins, the index-th of the answer; `id` is new."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call is complete: its arguments are a JSON object."""

    index: int


Event: TypeAlias = Content | Reasoning | CallStart | CallArguments | CallEnd


class AnswerParser(Protocol):
    """Reads the text of one answer as it comes; takes any text and never raises."""

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is now sure."""

    def finish(self) -> list[Event]:
        """Return what was held back, now that no text comes any more."""


def join_events(events: Iterable[Event]) -> list[Event]:
    """Return the events with neighbours of one kind made into one, and without empty ones."""
    joined: list[Event] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            last = joined.pop()
            text = "".join(texts)
            if isinstance(last, CallArguments):
                joined.append(CallArguments(last.index, text))
            else:
                joined.append(Content(text) if isinstance(last, Content) else Reasoning(text))
            texts.clear()

    for event in events:
        if isinstance(event, CallStart | CallEnd):
            flush()
            joined.append(event)
        elif event.text:
            if not (texts and _is_more_of(joined[-1], event)):
                flush()
                joined.append(event)
            texts.append(event.text)
    flush()
    return joined


def _is_more_of(earlier: Event, later: Event) -> bool:
    if isinstance(earlier, CallArguments) and isinstance(later, CallArguments):
        return earlier.index == later.index
    return type(earlier) is type(later)
