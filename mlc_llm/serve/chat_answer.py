"""From what an answer's text means to OpenAI's messages and the deltas of their streams."""

from __future__ import annotations

from mlc_llm.serve.generation import Piece
from mlc_llm.serve.protocol.chat import AnswerMessage, ChoiceDelta, DeltaCall, DeltaFunction
from mlc_llm.serve.protocol.tools import AnswerCall, AnswerFunction
from mlc_llm.text.events import CallArguments, CallStart, Content, Event, Reasoning


class AnswerWriter:
    """Collects one answer that is not streamed."""

    def __init__(self, has_reasoning: bool = True) -> None:
        """has_reasoning: whether thoughts are part of the answer."""
        self._has_reasoning = has_reasoning
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[AnswerCall] = []
        self._arguments: list[list[str]] = []

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        for event in events_of(piece):
            if isinstance(event, Content):
                self._content.append(event.text)
            elif isinstance(event, Reasoning):
                self._thoughts.append(event.text)
            elif isinstance(event, CallStart):
                function = AnswerFunction(name=event.name, arguments="")
                self._calls.append(AnswerCall(id=event.id, function=function))
                self._arguments.append([])
            elif isinstance(event, CallArguments):
                self._arguments[event.index].append(event.text)

    def message(self) -> AnswerMessage:
        """Return the message; its content is null where there are calls alone."""
        for call, texts in zip(self._calls, self._arguments, strict=True):
            call.function.arguments = "".join(texts)
        content = "".join(self._content)
        message = AnswerMessage(content=content if content or not self._calls else None)
        if self._thoughts and self._has_reasoning:
            message.reasoning_content = "".join(self._thoughts)
        if self._calls:
            message.tool_calls = self._calls
        return message


def deltas_of(piece: Piece, has_reasoning: bool = True) -> list[ChoiceDelta]:
    """Return what a piece adds to an answer.

    Where it brings tokens and nothing to see, that is one delta with empty content, so that the
    tokens' log-probabilities are told.
    """
    deltas = [_delta_of(event) for event in events_of(piece)]
    seen = [
        delta
        for delta in deltas
        if delta is not None and (has_reasoning or delta.reasoning_content is None)
    ]
    return seen or ([ChoiceDelta(content="")] if piece.tokens else [])


def events_of(piece: Piece) -> list[Event]:
    """Return what a piece says."""
    if piece.events is not None:
        return piece.events
    return [Content(piece.text)] if piece.text else []


def _delta_of(event: Event) -> ChoiceDelta | None:
    if isinstance(event, Content):
        return ChoiceDelta(content=event.text)
    if isinstance(event, Reasoning):
        return ChoiceDelta(reasoning_content=event.text)
    if isinstance(event, CallStart):
        function = DeltaFunction(name=event.name, arguments="")
        call = DeltaCall(index=event.index, id=event.id, type="function", function=function)
        return ChoiceDelta(tool_calls=[call])
    if isinstance(event, CallArguments):
        function = DeltaFunction(arguments=event.text)
        return ChoiceDelta(tool_calls=[DeltaCall(index=event.index, function=function)])
    return None
