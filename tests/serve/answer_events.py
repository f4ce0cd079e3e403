"""The events of an answer that thinks, speaks and calls twice; what writers of protocols write."""

from __future__ import annotations

from mlc_llm.text.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning

ANSWER: list[Event] = [
    Reasoning("h"),
    Reasoning("m"),
    Content("I "),
    Content("look."),
    CallStart(0, "call_a", "f"),
    CallArguments(0, '{"a":'),
    CallArguments(0, "1}"),
    CallEnd(0),
    CallStart(1, "call_b", "g"),
    CallArguments(1, "{}"),
    CallEnd(1),
]
