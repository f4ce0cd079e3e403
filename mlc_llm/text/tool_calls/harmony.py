"""gpt-oss: messages on channels. `analysis` is reasoning, `final` is content, and a message to
`functions.NAME` is a call whose body is the arguments.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlc_llm.text.events import Event, Reasoning
from mlc_llm.text.tool_calls.json_calls import read_arguments, skip_space
from mlc_llm.text.tool_calls.reading import (
    CallWriter,
    Markers,
    NotACall,
    Reading,
    new_call_id,
)

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
FINAL = f"{CHANNEL}final{MESSAGE}"  # what an answer to the user begins with
SHOWN = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
_ENDS = (END, CALL, RETURN)
_RECIPIENT = " to="
_MAX_HEADER_LEN = 512
_SLICE = 256


class HarmonyParser:
    """Tells thoughts, content and calls apart; an `AnswerParser`."""

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        *,
        holds_calls: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._writer = CallWriter(tools, new_id, holds_calls)
        self._tokens = Markers(SHOWN)
        self._tail = ""
        # The text before the body of a message; None inside of a body.
        self._header: str | None = ""
        self._is_reasoning = False
        self._block: Reading | None = None

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is now sure."""
        for start in range(0, len(text), _SLICE):
            self._take(text[start : start + _SLICE])
        return self._writer.take_events()

    def finish(self) -> list[Event]:
        """Return what was held back, now that no text comes any more."""
        tail, self._tail = self._tail, ""
        self._put_text(tail)
        if self._header not in (None, "", START + "assistant"):
            self._writer.text(self._header or "")
        self._header = ""
        self._end_body()
        self._writer.finish()
        return self._writer.take_events()

    def _take(self, text: str) -> None:
        text = self._tail + text
        while text:
            place, token = self._tokens.find(text)
            kept = 0 if token else self._tokens.num_begun(text)
            self._put_text(text[: place - kept])
            self._tail = text[len(text) - kept :] if kept else ""
            if not token:
                return
            self._put_token(token)
            text = text[place + len(token) :]
        self._tail = ""

    def _put_token(self, token: str) -> None:
        if self._header is None:
            if token in _ENDS or token in (START, CHANNEL):
                self._end_body()
                self._header = token if token in (START, CHANNEL) else ""
            else:
                self._put_text(token)
        elif token == MESSAGE:
            self._begin_body(self._header)
        elif token in _ENDS:
            self._writer.text(self._header)  # a message without a body
            self._header = ""
        else:
            self._put_header(token)

    def _put_text(self, text: str) -> None:
        if not text:
            return
        if self._header is not None:
            self._put_header(text)
        elif self._block is not None:
            self._put_arguments(text)
        elif self._is_reasoning:
            self._writer.events.append(Reasoning(text))
        else:
            self._writer.text(text)

    def _put_header(self, text: str) -> None:
        header = self._header = (self._header or "") + text
        is_begun = header.startswith((START, CHANNEL, _RECIPIENT[: len(header)]))
        if len(header) > _MAX_HEADER_LEN or not is_begun:
            # It is none, so the answer is plain.
            self._header = None
            self._writer.text(header)

    def _begin_body(self, header: str) -> None:
        self._header = None
        spaced = header
        for token in SHOWN:
            spaced = spaced.replace(token, f" {token} ")
        words = spaced.split()
        recipient = next((word[3:] for word in words if word.startswith("to=")), "")
        channel = words[words.index(CHANNEL) + 1 :][:1] if CHANNEL in words else []
        self._is_reasoning = channel == ["analysis"] and not recipient
        name = recipient.removeprefix("functions.")
        if name in self._writer.tools:
            self._writer.raw.append(header + MESSAGE)
            self._block = _read_body(name, self._writer)
            next(self._block)

    def _put_arguments(self, text: str) -> None:
        assert self._block is not None
        for number, char in enumerate(text):
            self._writer.raw.append(char)
            try:
                self._block.send(char)
            except NotACall:
                self._writer.abandon()
                self._block = None
                self._writer.text(text[number + 1 :])
                return

    def _end_body(self) -> None:
        if self._block is not None:
            self._block.close()
            self._block = None
            self._writer.abandon()
        self._is_reasoning = False


def _read_body(name: str, out: CallWriter) -> Reading:
    """Read arguments, and nothing after them but space."""
    char = yield from skip_space((yield))
    yield from read_arguments(char, out.arguments, lambda: out.start(name))
    out.end()
    while (yield).isspace():
        continue
    raise NotACall
