"""From the events of an answer to a message in Anthropic's blocks, and the events of its stream.

A message that is not streamed is written the same way. Knows neither models nor HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from mlc_llm.serve.protocol.anthropic_answer import (
    AnthropicMessage,
    ContentBlock,
    MessageDelta,
    MessageEvent,
    MessageUsage,
    StopReason,
    TextContent,
    ThinkingContent,
    ToolUseContent,
)
from mlc_llm.text.events import CallArguments, CallEnd, CallStart, Content, Event


class MessageWriter:
    """Writes one message, block after block. message: as it is so far."""

    def __init__(self, message: AnthropicMessage) -> None:
        self.message = message
        self.has_calls = False
        self._block: ContentBlock | None = None  # the one that is being written
        self._texts: list[str] = []  # of its text or input

    def begin(self, usage: MessageUsage) -> list[MessageEvent]:
        """Return the events before the first block."""
        self.message.usage = usage
        start = self.message.model_copy(deep=True)
        return [MessageEvent(type="message_start", message=start), MessageEvent(type="ping")]

    def take(self, events: Iterable[Event]) -> list[MessageEvent]:
        """Write more of the answer; return the events that tell of it."""
        return [told for event in events for told in self._take(event)]

    def finish(
        self, reason: StopReason, stop_sequence: str | None, usage: MessageUsage
    ) -> list[MessageEvent]:
        """End the message."""
        last = self._close()
        self.message.usage = usage
        self.message.stop_reason, self.message.stop_sequence = reason, stop_sequence
        delta = MessageDelta(stop_reason=reason, stop_sequence=stop_sequence)
        end = MessageEvent(type="message_delta", delta=delta, usage=usage)
        return [*last, end, MessageEvent(type="message_stop")]

    def _take(self, event: Event) -> list[MessageEvent]:
        if isinstance(event, CallStart):
            return self._open(ToolUseContent(id=event.id, name=event.name, input={}))
        if isinstance(event, CallArguments):
            return [self._add("input_json_delta", partial_json=event.text)]
        if isinstance(event, CallEnd):
            self.has_calls = True
            return self._close()
        if isinstance(event, Content):
            is_open = isinstance(self._block, TextContent)
            told = [] if is_open else self._open(TextContent(text=""))
            return [*told, self._add("text_delta", text=event.text)]
        is_open = isinstance(self._block, ThinkingContent)
        told = [] if is_open else self._open(ThinkingContent(thinking=""))
        return [*told, self._add("thinking_delta", thinking=event.text)]

    def _open(self, block: ContentBlock) -> list[MessageEvent]:
        closing = self._close()
        self._block = block
        self.message.content.append(block)
        start = block.model_copy()
        return [*closing, self._about("content_block_start", content_block=start)]

    def _add(self, kind: Any, **fields: Any) -> MessageEvent:
        self._texts += fields.values()
        return self._about("content_block_delta", delta=MessageDelta(type=kind, **fields))

    def _close(self) -> list[MessageEvent]:
        """End the block that is being written, if there is one."""
        block, text = self._block, "".join(self._texts)
        if block is None:
            return []
        if isinstance(block, TextContent):
            block.text = text
        elif isinstance(block, ThinkingContent):
            block.thinking = text
        else:
            block.input = _read_input(text)
        self._block, self._texts = None, []
        return [self._about("content_block_stop")]

    def _about(self, kind: Any, **fields: Any) -> MessageEvent:
        return MessageEvent(type=kind, index=len(self.message.content) - 1, **fields)


def _read_input(text: str) -> dict[str, Any]:
    """Return the arguments of a call; of those that were cut, the ones that are there."""
    try:
        value = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
