"""Anthropic's `/v1/messages` without HTTP: messages in, a message or its events out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from mlc_llm.serve.anthropic_input import OUR_NAMES, chat_request_of
from mlc_llm.serve.anthropic_output import MessageWriter
from mlc_llm.serve.chat import count_prompt_tokens
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.anthropic import CountTokensRequest, MessagesRequest
from mlc_llm.serve.protocol.anthropic_answer import (
    AnthropicMessage,
    MessageEvent,
    MessageUsage,
    StopReason,
    TokenCount,
)
from mlc_llm.serve.sse import EventFormat, named_event, named_event_of
from mlc_llm.serve.transcript import renamed_fields
from mlc_llm.serve.turn import Turn, TurnEnd

MESSAGE_PREFIX = "msg_"
MESSAGE_EVENTS = EventFormat(
    named_event_of, lambda failure: named_event("error", failure.anthropic_body_bytes)
)


async def answer(model: ServedModel, request: MessagesRequest, request_id: str) -> AnthropicMessage:
    """Return the answer to a conversation.

    The engine knows it by `request_id`, which is the message's id too. Raises RequestError and
    its kinds, OptionError or TemplateError; cancelling it aborts the request.
    """
    turn = await _start(model, request, request_id)
    writer = MessageWriter(_blank(model, turn, request_id))
    events, end = await turn.collect()
    writer.take(events)
    _finish(writer, request, turn, end)
    return writer.message


async def answer_stream(
    model: ServedModel, request: MessagesRequest, request_id: str
) -> AsyncGenerator[MessageEvent, None]:
    """Return the events of an answer, once the request is admitted.

    Raises as `answer` does; errors that come later are raised by the events. The first event comes
    with the first tokens. Leaving the events, or dropping them, aborts the request.
    """
    turn = await _start(model, request, request_id)
    return _events(MessageWriter(_blank(model, turn, request_id)), request, turn)


async def count_tokens(model: ServedModel, request: CountTokensRequest) -> TokenCount:
    """Return how many tokens a conversation has. Raises as `answer` does, before any work."""
    with renamed_fields(OUR_NAMES):
        num_tokens = await count_prompt_tokens(model, chat_request_of(request))
    return TokenCount(input_tokens=num_tokens)


async def _events(
    writer: MessageWriter, request: MessagesRequest, turn: Turn
) -> AsyncGenerator[MessageEvent, None]:
    has_begun = False
    async with aclosing(turn.pieces()) as pieces:
        async for piece in pieces:
            told = [] if has_begun else writer.begin(_usage(turn))
            has_begun = True
            told += writer.take(piece.events)
            if piece.end is not None:
                told += _finish(writer, request, turn, piece.end)
            for event in told:
                yield event


async def _start(model: ServedModel, request: MessagesRequest, request_id: str) -> Turn:
    with renamed_fields(OUR_NAMES):
        chat_request = chat_request_of(request)
    return await Turn.start(model, chat_request, request_id, OUR_NAMES)


def _blank(model: ServedModel, turn: Turn, request_id: str) -> AnthropicMessage:
    return AnthropicMessage(id=request_id, model=model.name, usage=_usage(turn))


def _finish(
    writer: MessageWriter, request: MessagesRequest, turn: Turn, end: TurnEnd
) -> list[MessageEvent]:
    reason: StopReason = "end_turn"
    stop_sequence = None
    if end == "length":
        reason = "max_tokens"
    elif end == "context":
        reason = "model_context_window_exceeded"
    elif turn.stop_string is not None and turn.stop_string in (request.stop_sequences or ()):
        reason, stop_sequence = "stop_sequence", turn.stop_string
    elif writer.has_calls:
        reason = "tool_use"
    return writer.finish(reason, stop_sequence, _usage(turn))


def _usage(turn: Turn) -> MessageUsage:
    usage = turn.usage
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
    )
