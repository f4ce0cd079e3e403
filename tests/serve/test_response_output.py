"""Responses written from events: each event as OpenAI's package reads it, the same whole or not."""

from __future__ import annotations

from typing import Any

import pytest
from answer_events import ANSWER
from openai.types import responses
from openai.types.responses import ResponseStreamEvent
from openai_shapes import strictly, unknown_fields
from pydantic import TypeAdapter

from mlc_llm.errors import StepFailed
from mlc_llm.serve.errors import failure_of
from mlc_llm.serve.protocol.response_events import (
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseUsage,
)
from mlc_llm.serve.response_output import ResponseWriter
from mlc_llm.text.events import CallArguments, CallStart, Content, Event

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USAGE = ResponseUsage(
    input_tokens=3,
    input_tokens_details=InputTokensDetails(cached_tokens=2),
    output_tokens=4,
    output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
    total_tokens=7,
)


def blank() -> Response:
    return Response(
        id="resp_1",
        created_at=1,
        instructions=None,
        max_output_tokens=None,
        metadata={},
        model="m",
        parallel_tool_calls=True,
        reasoning={"effort": None, "summary": None},
        temperature=1.0,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        top_p=1.0,
    )


def stream(events: list[Event], *, is_cut: bool = False) -> list[Any]:
    """Return the events of a stream as OpenAI's package reads them."""
    writer = ResponseWriter(blank())
    told = writer.begin()
    for event in events:
        told += writer.take([event])
    told += writer.finish(is_cut=is_cut, usage=USAGE)
    read = [EVENTS.validate_json(event.model_dump_json(), strict=True) for event in told]
    assert [event.type for event in read] == [event.type for event in told]
    assert not [name for event in read for name in unknown_fields(event)]
    assert [event.sequence_number for event in read] == list(range(len(read)))
    return read


def whole(events: list[Event], *, is_cut: bool = False) -> responses.Response:
    writer = ResponseWriter(blank())
    writer.take(events)
    writer.finish(is_cut=is_cut, usage=USAGE)
    read: responses.Response = strictly(responses.Response, writer.response)
    return read


def outline(response: responses.Response) -> list[Any]:
    """Return what items say, without their ids."""
    return [item.model_dump(exclude={"id"}) for item in response.output]


def test_a_text() -> None:
    read = stream([Content("a"), Content("b")])
    assert [event.type.removeprefix("response.") for event in read] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert read[0].response.output == [] and read[0].response.status == "in_progress"
    assert read[2].item.content == [] and read[2].item.status == "in_progress"
    assert read[6].text == read[7].part.text == "ab"
    assert read[-1].response.output_text == "ab"
    assert read[-1].response.output == [read[8].item]
    assert {event.item_id for event in read[3:8]} == {read[2].item.id}


def test_thoughts_text_and_calls() -> None:
    read = stream(ANSWER)
    kinds = [event.type.removeprefix("response.") for event in read]
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    assert kinds[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    calls = [event for event in read if "function_call_arguments" in event.type]
    assert [getattr(event, "delta", None) for event in calls] == ['{"a":', "1}", None, "{}", None]
    assert calls[2].arguments == '{"a":1}'
    thoughts, message, first, second = read[-1].response.output
    assert thoughts.type == "reasoning" and thoughts.content[0].text == "hm"
    assert message.content[0].text == "I look."
    assert (first.name, first.call_id, first.arguments) == ("f", "call_a", '{"a":1}')
    assert (second.name, second.call_id, second.arguments) == ("g", "call_b", "{}")
    assert {item.status for item in read[-1].response.output} == {"completed"}
    assert len({item.id for item in read[-1].response.output}) == 4


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("length", range(len(ANSWER) + 1))
def test_streamed_or_not_it_is_the_same(length: int, is_cut: bool) -> None:
    events = ANSWER[:length]
    streamed = stream(events, is_cut=is_cut)[-1].response
    assert outline(streamed) == outline(whole(events, is_cut=is_cut))
    assert streamed.usage.total_tokens == 7
    assert streamed.usage.input_tokens_details.cached_tokens == 2
    if is_cut:
        assert (streamed.status, streamed.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
    else:
        assert streamed.status == "completed" and streamed.incomplete_details is None


def test_what_is_cut_is_incomplete() -> None:
    message = whole([Content("a")], is_cut=True).output[0]
    assert message.status == "incomplete"  # type: ignore[union-attr]
    call = whole([CallStart(0, "c", "f"), CallArguments(0, '{"a')], is_cut=True).output[0]
    assert isinstance(call, responses.ResponseFunctionToolCall)
    assert (call.status, call.arguments) == ("incomplete", '{"a')


def test_a_call_that_becomes_text_is_incomplete() -> None:
    response = stream([CallStart(0, "c", "f"), CallArguments(0, '{"a'), Content("or not")])[-1]
    call, message = response.response.output
    assert (call.status, message.status) == ("incomplete", "completed")
    assert response.response.output_text == "or not"


def test_a_failure_is_the_last_event() -> None:
    writer = ResponseWriter(blank())
    told = [*writer.begin(), *writer.take([Content("a")])]
    told += writer.fail(failure_of(StepFailed("the step failed")))
    read = EVENTS.validate_json(told[-1].model_dump_json(), strict=True)
    assert read.type == "response.failed"
    assert read.response.status == "failed"
    assert read.response.error.message == "the step failed"
    assert read.response.output[0].content[0].text == "a"
    assert read.response.output[0].status == "incomplete"
    assert read.sequence_number == len(told) - 1
