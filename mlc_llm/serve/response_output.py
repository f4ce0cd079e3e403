"""From the events of an answer to a response: its items, and the events of its stream.

A response that is not streamed is written the same way. Knows neither models nor HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from mlc_llm.serve.errors import Failure
from mlc_llm.serve.protocol.response_events import (
    EventType,
    IncompleteDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
)
from mlc_llm.text.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning


class ResponseWriter:
    """Writes one response, item after item.

    response: as it is so far. Events hold copies of what changes later.
    """

    def __init__(self, response: Response) -> None:
        self.response = response
        self._num_events = 0
        self._item: OutputItem | None = None  # the one that is being written
        self._texts: list[str] = []  # of its text or arguments

    def begin(self) -> list[ResponseEvent]:
        """Return the events before the first item."""
        return [self._state("response.created"), self._state("response.in_progress")]

    def take(self, events: Iterable[Event]) -> list[ResponseEvent]:
        """Write more of the answer; return the events that tell of it."""
        return [told for event in events for told in self._take(event)]

    def finish(self, *, is_cut: bool, usage: ResponseUsage) -> list[ResponseEvent]:
        """End the answer; is_cut: it reached a limit on its length."""
        last = self._close(is_complete=not is_cut)
        self.response.usage = usage
        if is_cut:
            self.response.status = "incomplete"
            self.response.incomplete_details = IncompleteDetails()
            return [*last, self._state("response.incomplete")]
        self.response.status = "completed"
        self.response.completed_at = int(time.time())
        return [*last, self._state("response.completed")]

    def fail(self, failure: Failure) -> list[ResponseEvent]:
        """End the answer with an error; what was written of the last item stays incomplete."""
        last = self._close(is_complete=False)
        self.response.status = "failed"
        self.response.error = ResponseError(message=failure.message)
        return [*last, self._state("response.failed")]

    def _take(self, event: Event) -> list[ResponseEvent]:
        if isinstance(event, Content | Reasoning):
            return self._take_text(event)
        if isinstance(event, CallStart):
            closing = self._close()
            call = OutputCall(
                id=_new_id("fc"),
                status="in_progress",
                call_id=event.id,
                name=event.name,
                arguments="",
            )
            return [*closing, self._open(call)]
        if isinstance(event, CallArguments):
            self._texts.append(event.text)
            return [self._about("response.function_call_arguments.delta", delta=event.text)]
        assert isinstance(event, CallEnd)
        return self._close()

    def _take_text(self, event: Content | Reasoning) -> list[ResponseEvent]:
        told = []
        kind = OutputMessage if isinstance(event, Content) else OutputReasoning
        if not isinstance(self._item, kind):
            # A call that is still open has turned out to be none that can be made.
            told += self._close(is_complete=not isinstance(self._item, OutputCall))
            item: OutputItem
            if isinstance(event, Content):
                item = OutputMessage(id=_new_id("msg"), status="in_progress", content=[])
            else:
                item = OutputReasoning(id=_new_id("rs"), status="in_progress", content=[])
            told.append(self._open(item))
            part = _part(item, "")
            told.append(self._about("response.content_part.added", content_index=0, part=part))
        self._texts.append(event.text)
        told.append(self._about_text("delta", delta=event.text))
        return told

    def _open(self, item: OutputItem) -> ResponseEvent:
        self._item = item
        self.response.output.append(item)
        place = len(self.response.output) - 1
        return self._event(
            "response.output_item.added", output_index=place, item=item.model_copy(deep=True)
        )

    def _close(self, *, is_complete: bool = True) -> list[ResponseEvent]:
        """End the item that is being written, if there is one."""
        item = self._item
        if item is None:
            return []
        text = "".join(self._texts)
        if isinstance(item, OutputCall):
            item.arguments = text
            told = [self._about("response.function_call_arguments.done", arguments=text)]
        else:
            part = _part(item, text)
            item.content = [part]  # type: ignore[assignment]
            told = [
                self._about_text("done", text=text),
                self._about("response.content_part.done", content_index=0, part=part),
            ]
        item.status = "completed" if is_complete else "incomplete"
        place = len(self.response.output) - 1
        told.append(self._event("response.output_item.done", output_index=place, item=item))
        self._item, self._texts = None, []
        return told

    def _about_text(self, what: str, **fields: Any) -> ResponseEvent:
        if isinstance(self._item, OutputMessage):
            fields["logprobs"] = []
            kind: Any = f"response.output_text.{what}"
        else:
            kind = f"response.reasoning_text.{what}"
        return self._about(kind, content_index=0, **fields)

    def _about(self, kind: EventType, **fields: Any) -> ResponseEvent:
        """Return an event about the item that is being written."""
        assert self._item is not None
        place = len(self.response.output) - 1
        return self._event(kind, output_index=place, item_id=self._item.id, **fields)

    def _state(self, kind: EventType) -> ResponseEvent:
        return self._event(kind, response=self.response.model_copy(deep=True))

    def _event(self, kind: EventType, **fields: Any) -> ResponseEvent:
        event = ResponseEvent(type=kind, sequence_number=self._num_events, **fields)
        self._num_events += 1
        return event


def _part(item: OutputItem, text: str) -> OutputText | ReasoningText:
    return OutputText(text=text) if isinstance(item, OutputMessage) else ReasoningText(text=text)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
