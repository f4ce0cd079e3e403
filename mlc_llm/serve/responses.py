"""`/v1/responses` without HTTP: items in, a response or its events out. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from mlc_llm.serve.errors import failure_of
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.response_events import (
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseEvent,
    ResponseUsage,
)
from mlc_llm.serve.protocol.responses import ResponseRequest
from mlc_llm.serve.response_input import OUR_NAMES, chat_request_of
from mlc_llm.serve.response_output import ResponseWriter
from mlc_llm.serve.sse import EventFormat, named_event_of
from mlc_llm.serve.transcript import renamed_fields
from mlc_llm.serve.turn import Turn

RESPONSE_PREFIX = "resp_"
# A failure has been told by the last event already.
RESPONSE_EVENTS = EventFormat(named_event_of, lambda failure: b"")


async def respond(model: ServedModel, request: ResponseRequest, request_id: str) -> Response:
    """Return the response to a request.

    The engine knows it by `request_id`, which is the response's id too. Raises RequestError and
    its kinds, OptionError or TemplateError; cancelling it aborts the request.
    """
    writer = ResponseWriter(_blank(model, request, request_id))
    turn = await _start(model, request, request_id)
    events, end = await turn.collect()
    writer.take(events)
    writer.finish(is_cut=end != "stop", usage=_usage(turn))
    return writer.response


async def respond_stream(
    model: ServedModel, request: ResponseRequest, request_id: str
) -> AsyncGenerator[ResponseEvent, None]:
    """Return the events of a response, once the request is admitted.

    Raises as `respond` does; errors that come later are told by the last event and then raised.
    The first event comes with the first tokens. Leaving the events, or dropping them, aborts the
    request.
    """
    writer = ResponseWriter(_blank(model, request, request_id))
    return _events(writer, await _start(model, request, request_id))


async def _events(writer: ResponseWriter, turn: Turn) -> AsyncGenerator[ResponseEvent, None]:
    has_begun = False
    try:
        async with aclosing(turn.pieces()) as pieces:
            async for piece in pieces:
                told = [] if has_begun else writer.begin()
                has_begun = True
                told += writer.take(piece.events)
                if piece.end is not None:
                    told += writer.finish(is_cut=piece.end != "stop", usage=_usage(turn))
                for event in told:
                    yield event
    except Exception as error:
        for event in writer.fail(failure_of(error)) if has_begun else ():
            yield event
        raise


async def _start(model: ServedModel, request: ResponseRequest, request_id: str) -> Turn:
    with renamed_fields(OUR_NAMES):
        chat_request = chat_request_of(request)
    return await Turn.start(model, chat_request, request_id, OUR_NAMES)


def _blank(model: ServedModel, request: ResponseRequest, request_id: str) -> Response:
    """Return the response that has no output yet."""
    defaults = model.defaults
    text = request.text
    form = None if text is None or text.format is None else text.format
    return Response(
        id=request_id,
        created_at=int(time.time()),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        model=model.name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning={
            "effort": request.reasoning.effort if request.reasoning is not None else None,
            "summary": None,
        },
        temperature=_first(request.temperature, defaults.temperature),
        text={
            "format": {"type": "text"}
            if form is None
            else form.model_dump(by_alias=True, exclude_none=True)
        },
        tool_choice=request.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
        tools=[
            tool.model_dump(include={"type", "name", "description", "parameters", "strict"})
            for tool in request.tools or ()
        ],
        top_p=_first(request.top_p, defaults.top_p),
        service_tier=None if request.service_tier is None else "default",
    )


def _first(given: float | None, default: float) -> float:
    return default if given is None else given


def _usage(turn: Turn) -> ResponseUsage:
    usage = turn.usage
    cached = usage.prompt_tokens_details.cached_tokens
    thoughts = usage.completion_tokens_details.reasoning_tokens
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=cached),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=thoughts),
        total_tokens=usage.total_tokens,
    )
