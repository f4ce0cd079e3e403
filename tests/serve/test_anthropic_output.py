"""Messages written from events: as Anthropic's package reads them, the same whole or not."""

from __future__ import annotations

from typing import Any

import pytest
from answer_events import ANSWER
from anthropic.types import Message, RawMessageStreamEvent
from openai_shapes import strictly, unknown_fields
from pydantic import TypeAdapter
from pydantic_core import from_json

from mlc_llm.serve.anthropic_output import MessageWriter
from mlc_llm.serve.protocol.anthropic_answer import AnthropicMessage, MessageUsage
from mlc_llm.text.events import CallArguments, CallStart, Content, Event

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
BEFORE = MessageUsage(input_tokens=3, cache_read_input_tokens=2, output_tokens=0)
USAGE = MessageUsage(input_tokens=3, cache_read_input_tokens=2, output_tokens=4)


def blank() -> MessageWriter:
    return MessageWriter(AnthropicMessage(id="msg_1", model="m", usage=BEFORE))


def stream(events: list[Event]) -> list[Any]:
    """Return the events of a stream, but for pings, as Anthropic's package reads them."""
    writer = blank()
    told = writer.begin(BEFORE)
    for event in events:
        told += writer.take([event])
    told += writer.finish("end_turn", None, USAGE)
    assert [event.type for event in told].count("ping") == 1
    texts = [event.model_dump_json() for event in told if event.type != "ping"]
    read = [EVENTS.validate_json(text, strict=True) for text in texts]
    assert not [name for event in read for name in unknown_fields(event)]
    return read


def whole(events: list[Event]) -> Message:
    writer = blank()
    writer.take(events)
    writer.finish("end_turn", None, USAGE)
    read: Message = strictly(Message, writer.message)
    return read


def test_a_text() -> None:
    read = stream([Content("a"), Content("b")])
    assert [event.type for event in read] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = read[0].message
    assert (start.content, start.stop_reason, start.usage.output_tokens) == ([], None, 0)
    assert [event.delta.text for event in read[2:4]] == ["a", "b"]
    assert (read[5].delta.stop_reason, read[5].usage.output_tokens) == ("end_turn", 4)


def test_thoughts_text_and_calls() -> None:
    thoughts, text, first, second = whole(ANSWER).content
    assert thoughts.type == "thinking" and thoughts.thinking == "hm"
    assert text.type == "text" and text.text == "I look."
    assert first.type == "tool_use" and second.type == "tool_use"
    assert (first.id, first.name, first.input) == ("call_a", "f", {"a": 1})
    assert (second.id, second.name, second.input) == ("call_b", "g", {})


@pytest.mark.parametrize("length", range(len(ANSWER) + 1))
def test_streamed_or_not_it_is_the_same(length: int) -> None:
    start, *events, end, stop = stream(ANSWER[:length])
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        if event.type == "content_block_start":
            assert event.index == len(blocks)
            blocks.append(event.content_block.model_dump())
            texts.append("")
            continue
        assert event.index == len(blocks) - 1
        if event.type == "content_block_delta":
            name = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
            texts[-1] += getattr(event.delta, name[blocks[-1]["type"]])
        else:
            assert event.type == "content_block_stop"
    for block, text in zip(blocks, texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = from_json(text or "{}", allow_partial=True)
        else:
            block[block["type"]] = text
    expected = whole(ANSWER[:length])
    assert blocks == [block.model_dump() for block in expected.content]
    assert (end.delta.stop_reason, stop.type) == (expected.stop_reason, "message_stop")
    assert start.message.usage.cache_read_input_tokens == 2
    assert end.usage.output_tokens == expected.usage.output_tokens == 4


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", {}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": 1, "b": "c', {"a": 1}),
        ('{"a', {}),
        ("[1]", {}),
        ("no", {}),
    ],
)
def test_arguments_that_were_cut(text: str, read: dict[str, Any]) -> None:
    events: list[Event] = [CallStart(0, "c", "f")]
    events += [CallArguments(0, text)] if text else []
    block = whole(events).content[0]
    assert block.type == "tool_use" and block.input == read
