"""Chat completions without HTTP: messages in, an answer or its chunks out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from mlc_llm.serve.answer_plan import check_tools, plan_answers, renamed, template_variables
from mlc_llm.serve.chat_answer import AnswerWriter, deltas_of
from mlc_llm.serve.generation import (
    EndReason,
    Generation,
    Piece,
    PlacedToken,
    sampling_params,
    start_generation,
)
from mlc_llm.serve.logprobs import chat_logprobs
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChoiceDelta,
    ChunkChoice,
    FinishReason,
)
from mlc_llm.serve.protocol.messages import template_messages
from mlc_llm.serve.protocol.usage import Usage
from mlc_llm.serve.response_format import grammar_of
from mlc_llm.text.prompt import Prompt
from mlc_llm.text.reasoning import reasoning_variables

_ID_PREFIX = "chatcmpl-"


async def chat(
    model: ServedModel, request: ChatCompletionRequest, request_id: str
) -> ChatCompletion:
    """Answer a conversation.

    The engine knows the request by `request_id`, or by the one the request itself names. Raises
    RequestError and its kinds, OptionError or TemplateError; cancelling it aborts the request.
    """
    generation = await start_chat(model, request, request_id)
    count = request.num_choices
    answers = [AnswerWriter(request.include_reasoning is not False) for _ in range(count)]
    tokens: list[list[PlacedToken]] = [[] for _ in range(count)]
    reasons: list[FinishReason] = ["stop"] * count
    async with aclosing(generation.pieces()) as arriving:
        async for pieces in arriving:
            for piece in pieces:
                answers[piece.index].take(piece)
                tokens[piece.index] += piece.tokens
                if piece.finish_reason is not None:
                    reasons[piece.index] = _reason_of(piece.finish_reason, piece.has_calls)
    return ChatCompletion(
        **_head(model, request, request_id),
        choices=[
            ChatChoice(
                index=index,
                message=answers[index].message(),
                logprobs=_logprobs(model, request, tokens[index]),
                finish_reason=reasons[index],
            )
            for index in range(count)
        ],
        usage=usage_of(model, generation),
    )


async def chat_stream(
    model: ServedModel, request: ChatCompletionRequest, request_id: str
) -> AsyncGenerator[ChatCompletionChunk, None]:
    """Return the chunks of an answer, once the request is admitted.

    Raises as `chat` does; errors that come later are raised by the chunks. The first chunk comes
    with the first tokens. Leaving the chunks, or dropping them, aborts the request.
    """
    generation = await start_chat(model, request, request_id)
    return _chunks(model, request, request_id, generation)


async def _chunks(
    model: ServedModel, request: ChatCompletionRequest, request_id: str, generation: Generation
) -> AsyncGenerator[ChatCompletionChunk, None]:
    head = _head(model, request, request_id)
    if request.includes_usage:
        head["usage"] = None  # on all chunks but the last
    greeted: set[int] = set()
    async with aclosing(generation.pieces()) as arriving:
        async for pieces in arriving:
            for piece in pieces:
                is_first = piece.index not in greeted
                greeted.add(piece.index)
                for choice in _read_piece(model, request, piece, is_first):
                    yield ChatCompletionChunk(**head, choices=[choice])
    if request.includes_usage:
        usage = usage_of(model, generation)
        yield ChatCompletionChunk(**{**head, "usage": usage}, choices=[])


def _read_piece(
    model: ServedModel, request: ChatCompletionRequest, piece: Piece, is_first: bool
) -> list[ChunkChoice]:
    index = piece.index
    choices = []
    if is_first:
        delta = ChoiceDelta(role="assistant", content="", refusal=None)
        choices.append(ChunkChoice(index=index, delta=delta))
    logprobs = _logprobs(model, request, piece.tokens)
    for delta in deltas_of(piece, request.include_reasoning is not False):
        choices.append(ChunkChoice(index=index, delta=delta, logprobs=logprobs))
        logprobs = None  # they are told once
    if piece.finish_reason is not None:
        reason = _reason_of(piece.finish_reason, piece.has_calls)
        end = ChunkChoice(index=index, delta=ChoiceDelta(), finish_reason=reason)
        choices.append(end)
    return choices


async def start_chat(
    model: ServedModel, request: ChatCompletionRequest, request_id: str
) -> Generation:
    """Queue a conversation for its answers. Raises as `chat` does."""
    params = sampling_params(model, request, request.max_new_tokens, request.num_logprobs)
    await check_tools(model, request.tool_use)
    # Templates run in another process and long texts take time: neither holds up the event loop.
    prompt = await asyncio.to_thread(_prompt_of, model, request)
    plan = await asyncio.to_thread(
        plan_answers,
        model,
        prompt.token_ids,
        request.tool_use,
        content_grammar=grammar_of(request.response_format),
        splits_reasoning=request.separate_reasoning is not False,
        holds_calls=not request.stream,
        max_thoughts=request.thinking_token_budget,
    )
    engine_id = request.request_id or request_id
    with renamed(plan.grammar_param):
        return await start_generation(
            model,
            request,
            engine_id,
            prompt.token_ids,
            params,
            n=request.num_choices,
            plan=plan,
            grammar=plan.grammar,
            images=prompt.images,
        )


async def count_prompt_tokens(model: ServedModel, request: ChatCompletionRequest) -> int:
    """Return how many tokens the prompt of a conversation has. Raises as `chat` does."""
    prompt = await asyncio.to_thread(_prompt_of, model, request)
    return len(prompt.token_ids)


def _prompt_of(model: ServedModel, request: ChatCompletionRequest) -> Prompt:
    wishes = reasoning_variables(
        model.prompts.template_text,
        request.reasoning_effort,
        request.enable_thinking,
        request.thinking_token_budget,
    )
    return model.prompts.build(
        template_messages(request.messages),
        tools=request.tool_use.callable_tools,
        variables=template_variables(request.chat_template_kwargs, wishes),
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
    )


def _reason_of(reason: EndReason, has_calls: bool) -> FinishReason:
    return "tool_calls" if has_calls and reason == "stop" else reason


def _head(model: ServedModel, request: ChatCompletionRequest, request_id: str) -> dict[str, Any]:
    """Return what all chunks of an answer have in common."""
    answer_id = request.request_id or request_id
    head: dict[str, Any] = {
        "id": answer_id if answer_id.startswith(_ID_PREFIX) else _ID_PREFIX + answer_id,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }
    if request.service_tier is not None:
        head["service_tier"] = "default"
    return head


def _logprobs(
    model: ServedModel, request: ChatCompletionRequest, tokens: list[PlacedToken]
) -> ChatLogprobs | None:
    return chat_logprobs(tokens, model.token_bytes) if request.logprobs else None


def usage_of(model: ServedModel, generation: Generation) -> Usage:
    """Return the tokens of a chat so far."""
    thoughts = ["".join(text.thoughts) for text in generation.texts]
    return Usage.count(
        generation.num_prompt_tokens,
        generation.num_completion_tokens,
        generation.num_cached_tokens,
        sum(len(model.tokenizer.encode(text)) for text in thoughts if text),
    )
