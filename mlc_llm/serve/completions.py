"""Completions without HTTP: prompts in, continuations or their pieces out.

A prompt given as text gets what the tokenizer itself puts before a text (BOS, where the model wants
one), as Hugging Face's tokenizers do, and no chat template; one given as token ids is taken as it
is. The suffix is put after the text; it is no instruction to the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from mlc_llm.serve.generation import (
    EndReason,
    Generation,
    Piece,
    PlacedToken,
    merge_pieces,
    sampling_params,
    start_generation,
)
from mlc_llm.serve.logprobs import Columns
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
)
from mlc_llm.serve.protocol.usage import Usage

_ID_PREFIX = "cmpl-"


@dataclass(frozen=True)
class _Prompt:
    """A prompt's ids; its text and where each token begins in it, as far as echo asks for them."""

    token_ids: list[int]
    text: str = ""
    starts: list[int] = field(default_factory=list)


@dataclass
class _Answer:
    """One sequence's text so far."""

    texts: list[str] = field(default_factory=list)
    tokens: list[PlacedToken] = field(default_factory=list)
    finish_reason: EndReason = "stop"


async def complete(model: ServedModel, request: CompletionRequest, request_id: str) -> Completion:
    """Continue prompts; choices are in their order, n of each.

    The engine knows the first prompt by `request_id`, or by the one the request itself names, and
    the others by that with their number. Raises RequestError and its kinds or OptionError;
    cancelling it aborts all.
    """
    prompts, generations = await _start(model, request, request_id)
    answers = [[_Answer() for _ in generation.texts] for generation in generations]
    async with aclosing(merge_pieces(generations)) as arriving:
        async for number, pieces in arriving:
            for piece in pieces:
                answer = answers[number][piece.index]
                answer.texts.append(piece.text)
                answer.tokens += piece.tokens
                if piece.finish_reason is not None:
                    answer.finish_reason = piece.finish_reason
    choices = []
    for number, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        for rank, index in enumerate(_best(request, generation)):
            writer = _Writer(model, request, prompt, generation)
            answer = answers[number][index]
            piece = Piece(index, "".join(answer.texts), answer.tokens, answer.finish_reason)
            choices.append(writer.write(piece, number * request.num_choices + rank))
    return Completion(
        **_head(model, request, request_id), choices=choices, usage=_usage(request, generations)
    )


async def complete_stream(
    model: ServedModel, request: CompletionRequest, request_id: str
) -> AsyncGenerator[Completion, None]:
    """Return the pieces of continuations, once all prompts are admitted.

    Raises as `complete` does; errors that come later are raised by the pieces. Leaving the pieces,
    or dropping them, aborts all.
    """
    prompts, generations = await _start(model, request, request_id)
    return _chunks(model, request, request_id, prompts, generations)


async def _chunks(
    model: ServedModel,
    request: CompletionRequest,
    request_id: str,
    prompts: list[_Prompt],
    generations: list[Generation],
) -> AsyncGenerator[Completion, None]:
    head = _head(model, request, request_id)
    if request.includes_usage:
        head["usage"] = None  # on all chunks but the last
    writers: dict[int, _Writer] = {}
    async with aclosing(merge_pieces(generations)) as arriving:
        async for number, pieces in arriving:
            for piece in pieces:
                place = number * request.num_choices + piece.index
                if place not in writers:
                    writers[place] = _Writer(model, request, prompts[number], generations[number])
                choice = writers[place].write(piece, place)
                if choice.text or choice.logprobs or choice.finish_reason:
                    yield Completion(**head, choices=[choice])
    if request.includes_usage:
        yield Completion(**{**head, "usage": _usage(request, generations)}, choices=[])


class _Writer:
    """Makes a choice of pieces: the echo before the first one, the suffix after the last."""

    def __init__(
        self,
        model: ServedModel,
        request: CompletionRequest,
        prompt: _Prompt,
        generation: Generation,
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._generation = generation
        self._columns = (
            None if request.logprobs is None else Columns(request.logprobs, model.token_bytes)
        )
        self._is_first = True

    def write(self, piece: Piece, index: int) -> CompletionChoice:
        """Return a piece as a choice."""
        request, prompt, columns = self._request, self._prompt, self._columns
        is_echo_only = request.max_tokens == 0
        text = "" if is_echo_only else piece.text
        finish_reason = piece.finish_reason
        if is_echo_only and finish_reason is not None:
            finish_reason = "length"
        found = self._generation.prompt_logprobs
        if self._is_first and request.echo:
            text = prompt.text + text
            if columns is not None and found is not None:
                columns.add_prompt(prompt.token_ids, prompt.starts, found)
        self._is_first = False
        if columns is not None and not is_echo_only:
            columns.add(piece.tokens, len(prompt.text))
        if finish_reason is not None:
            text += request.suffix or ""
        logprobs = None if columns is None else columns.take()
        return CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason
        )


def _best(request: CompletionRequest, generation: Generation) -> list[int]:
    """Return the sequences to give: all, or those with the highest mean log-probability."""
    indices = list(range(len(generation.texts)))
    if len(indices) == request.num_choices:
        return indices

    def mean(index: int) -> float:
        text = generation.texts[index]
        return text.logprob_sum / max(text.num_tokens, 1)

    return sorted(indices, key=mean, reverse=True)[: request.num_choices]


async def _start(
    model: ServedModel, request: CompletionRequest, request_id: str
) -> tuple[list[_Prompt], list[Generation]]:
    is_ranked = request.num_candidates > request.num_choices
    num_logprobs = 0 if request.logprobs is None and is_ranked else request.logprobs
    # Without a token to make, one is made and left out: the step brings the prompt's probabilities.
    params = sampling_params(model, request, max(request.max_new_tokens, 1), num_logprobs)
    prompts = await asyncio.to_thread(_read_prompts, model, request)
    engine_id = request.request_id or request_id
    generations: list[Generation] = []
    try:
        for number, prompt in enumerate(prompts):
            generation = await start_generation(
                model,
                request,
                engine_id if number == 0 else f"{engine_id}-{number}",
                prompt.token_ids,
                params,
                n=request.num_candidates,
                prompt_logprobs=request.logprobs if request.echo else None,
                continues_text=True,
            )
            generations.append(generation)
    except BaseException:
        for generation in generations:
            await generation.close()
        raise
    return prompts, generations


def _read_prompts(model: ServedModel, request: CompletionRequest) -> list[_Prompt]:
    return [_read_prompt(model, request, given) for given in request.prompts]


def _read_prompt(model: ServedModel, request: CompletionRequest, given: str | list[int]) -> _Prompt:
    tokenizer = model.tokenizer
    is_text = isinstance(given, str)
    token_ids = tokenizer.encode(given) if isinstance(given, str) else given
    prefix = tokenizer.bos_prefix if is_text and request.add_special_tokens else []
    if token_ids[: len(prefix)] == prefix:
        prefix = []  # the text brings it
    if not request.echo:
        return _Prompt(prefix + token_ids)
    # Special tokens that were written out are part of the text, those of the ids are not.
    stream = tokenizer.stream(skip_special_tokens=not is_text)
    starts, pieces, length = [0] * len(prefix), [], 0
    for token_id in token_ids:
        starts.append(length)
        pieces.append(stream.put(token_id))
        length += len(pieces[-1])
    text = given if isinstance(given, str) else "".join([*pieces, stream.finish()])
    return _Prompt(prefix + token_ids, text, [min(start, len(text)) for start in starts])


def _head(model: ServedModel, request: CompletionRequest, request_id: str) -> dict[str, Any]:
    """Return what all pieces of an answer have in common."""
    answer_id = request.request_id or request_id
    return {
        "id": answer_id if answer_id.startswith(_ID_PREFIX) else _ID_PREFIX + answer_id,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


def _usage(request: CompletionRequest, generations: list[Generation]) -> Usage:
    num_made = sum(generation.num_completion_tokens for generation in generations)
    return Usage.count(
        sum(generation.num_prompt_tokens for generation in generations),
        0 if request.max_tokens == 0 else num_made,
        sum(generation.num_cached_tokens for generation in generations),
    )
