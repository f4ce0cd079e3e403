"""From checked requests to pieces of text: what chats and completions have in common.

Knows the worker and the text of its outputs; does not know HTTP, nor what answers look like.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.request import Output, Request, TokenLogprobs
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.stream import RequestStream
from mlc_llm.errors import RequestError
from mlc_llm.images.inputs import PromptImage
from mlc_llm.serve.answer_plan import AnswerPlan, renamed
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.generation import GenerationRequest
from mlc_llm.serve.response_format import grammar_of
from mlc_llm.text.events import AnswerParser, CallEnd, Event, Reasoning
from mlc_llm.text.grammars.schema import PARAM as GRAMMAR_PARAM
from mlc_llm.text.stream import TextStream

EndReason = Literal["stop", "length"]


@dataclass(frozen=True)
class PlacedToken:
    """A token whose text is out, and the character of the answer's text at which it begins."""

    start: int
    logprobs: TokenLogprobs


@dataclass
class Piece:
    """What arrived for one sequence: text, the tokens that are wholly in it, and maybe its end.

    events: what the text means, where there is a parser; None where it is content alone.
    has_calls: whether the sequence has called tools so far.
    """

    index: int
    text: str = ""
    tokens: list[PlacedToken] = field(default_factory=list)
    finish_reason: EndReason | None = None
    events: list[Event] | None = None
    has_calls: bool = False


class SequenceText:
    """The text side of one sequence.

    num_tokens: those of the text, up to the one that completed a stop string. thoughts: the pieces
    of its reasoning.
    """

    def __init__(
        self,
        index: int,
        stream: TextStream,
        parser: AnswerParser | None = None,
        max_calls: int = 0,
    ) -> None:
        """Take a stream, and a parser of its text; the text ends after max_calls calls, if any."""
        self.num_tokens = 0
        self.thoughts: list[str] = []
        self._parser = parser
        self._max_calls = max_calls
        self._num_calls = 0
        self.logprob_sum = 0.0
        self.finish_reason: EndReason | None = None
        self._index = index
        self._stream = stream
        # Tokens that are not out, in order: first those whose end in the text is known.
        self._placed: list[tuple[PlacedToken, int]] = []
        self._unplaced: list[PlacedToken] = []  # parts of a character that is not complete

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stream.matched

    def take(self, outputs: Sequence[Output]) -> Piece:
        """Turn outputs that arrived together into one piece. Raises an output's error."""
        piece = Piece(self._index)
        texts: list[str] = []
        for output in outputs:
            if output.error is not None:
                raise output.error
            if output.token_id is not None:
                texts.append(self._put(output.token_id, output.logprobs))
            if self._stream.stopped:
                self.finish_reason = "stop"
                break  # what follows was on its way when the stop string was found
            if output.finish_reason is not None:
                texts.append(self._stream.finish())
                self._place()
                # An abort from outside has no name in OpenAI's answers.
                self.finish_reason = "length" if output.finish_reason == "length" else "stop"
                break
        piece.text = "".join(texts)
        if self._parser is not None:
            piece.events = self._parse(self._parser, piece.text)
            piece.has_calls = self._num_calls > 0
        piece.tokens = self._take_tokens()
        piece.finish_reason = self.finish_reason
        return piece

    def _parse(self, parser: AnswerParser, text: str) -> list[Event]:
        events = parser.feed(text)
        if self.finish_reason is not None:
            events += parser.finish()
        for number, event in enumerate(events):
            if isinstance(event, Reasoning):
                self.thoughts.append(event.text)
            if isinstance(event, CallEnd):
                self._num_calls += 1
                if self._num_calls == self._max_calls:
                    self.finish_reason = "stop"
                    return events[: number + 1]
        return events

    def _put(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        self.num_tokens += 1
        start = self._stream.num_decoded
        text = self._stream.put(token_id)
        if logprobs is not None:
            self.logprob_sum += logprobs.logprob
            self._unplaced.append(PlacedToken(start, logprobs))
            if self._stream.num_decoded > start:
                self._place()
        return text

    def _place(self) -> None:
        end = self._stream.num_decoded
        self._placed += [(token, end) for token in self._unplaced]
        self._unplaced = []

    def _take_tokens(self) -> list[PlacedToken]:
        num_out = 0
        while num_out < len(self._placed) and self._placed[num_out][1] <= self._stream.num_passed:
            num_out += 1
        tokens = [token for token, _ in self._placed[:num_out]]
        del self._placed[:num_out]
        return tokens


class Generation:
    """One request to the engine and the texts of its n sequences."""

    def __init__(
        self,
        stream: RequestStream,
        texts: list[SequenceText],
        num_prompt: int,
        grammar_param: str = GRAMMAR_PARAM,
    ) -> None:
        """grammar_param: the field that errors about the grammar are to name."""
        self.texts = texts
        self._grammar_param = grammar_param
        self.num_prompt_tokens = num_prompt
        # One entry a prompt token, where they were asked for; there before the first piece.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._stream = stream

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all sequences so far."""
        return sum(text.num_tokens for text in self.texts)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return self._stream.stats.cached_tokens

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Yield what arrives together; leaving early, or any error, aborts the request."""
        async with self._stream:
            async for outputs in self._stream:
                with renamed(self._grammar_param):
                    pieces = self._read(outputs)
                is_over = all(text.finish_reason is not None for text in self.texts)
                if is_over:
                    # Of a stop string only the text knows.
                    self._stream.abort("stop")
                if pieces:
                    yield pieces
                if is_over:
                    return

    def _read(self, outputs: list[Output]) -> list[Piece]:
        by_index: dict[int, list[Output]] = {}
        for output in outputs:
            if output.prompt_logprobs is not None:
                self.prompt_logprobs = output.prompt_logprobs
            by_index.setdefault(output.index, []).append(output)
        return [
            self.texts[index].take(group)
            for index, group in by_index.items()
            if self.texts[index].finish_reason is None
        ]

    async def close(self) -> None:
        """Abort what is unfinished."""
        await self._stream.aclose()


async def start_generation(
    model: ServedModel,
    request: GenerationRequest,
    request_id: str,
    prompt: list[int],
    params: SamplingParams,
    *,
    n: int,
    prompt_logprobs: int | None = None,
    continues_text: bool = False,
    plan: AnswerPlan | None = None,
    grammar: GrammarSpec | None = None,
    images: tuple[PromptImage, ...] = (),
) -> Generation:
    """Queue a request; `continues_text` keeps the space between a prompt and what follows.

    plan: how answers are read.
    grammar: what the answers must match, in place of what the request's response_format says.
    Raises QueueFull, EngineStopped, ContextTooLong or RequestError.
    """
    stop_token_ids = frozenset(request.stop_token_ids or ())
    if bad := [token for token in stop_token_ids if token >= model.vocab_size]:
        raise RequestError(
            f"stop_token_ids has {bad[0]}, the model has {model.vocab_size:,} tokens",
            "stop_token_ids",
        )
    grammar = grammar or grammar_of(request.response_format)
    stop_texts = params.stop
    if not request.ignores_eos:
        stop_token_ids |= model.prompts.stop_token_ids
        stop_texts += tuple(model.prompts.stop_strings)
    context = prompt if continues_text else ()
    texts = []
    for index in range(n):
        parser = None if plan is None else plan.open_parser()
        shown = () if plan is None or parser is None else plan.shown
        text = TextStream(model.tokenizer, stop_texts, params.min_tokens, context, shown)
        texts.append(SequenceText(index, text, parser, 0 if plan is None else plan.max_calls))
    stream = await model.worker.submit(
        Request(
            request_id,
            prompt,
            params,
            n=n,
            stop_token_ids=stop_token_ids,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            prompt_logprobs=prompt_logprobs,
            grammar=grammar
            and replace(grammar, continues_text=continues_text or grammar.continues_text),
            images=images,
        ),
        model.timeout_s,
    )
    grammar_param = GRAMMAR_PARAM if plan is None else plan.grammar_param
    return Generation(stream, texts, len(prompt), grammar_param)


def sampling_params(
    model: ServedModel, request: GenerationRequest, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Return the request's settings over the model's own. Raises OptionError or RequestError."""
    if max_tokens is not None and (request.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens is {request.min_tokens}, more than max_tokens, {max_tokens}", "min_tokens"
        )
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "min_tokens": request.min_tokens,
    }
    return model.defaults.with_changes(
        **{name: value for name, value in given.items() if value is not None},
        # Other servers write "all tokens" as -1.
        top_k=max(request.top_k or 0, 0),
        max_tokens=max_tokens,
        logprobs=logprobs,
        logit_bias=request.bias_pairs,
        stop=request.stop_texts,
        ignore_eos=request.ignores_eos,
    )


async def merge_pieces(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, list[Piece]], None]:
    """Yield pieces of several generations as they come, with the generation's number.

    Leaving early, or the error of one, aborts all. Nothing is read ahead of the reader but one
    list of pieces a generation.
    """
    readers = [generation.pieces() for generation in generations]
    if len(readers) == 1:
        async with aclosing(readers[0]) as pieces_of_one:
            async for pieces in pieces_of_one:
                yield 0, pieces
        return
    waiting = {_next_of(reader): number for number, reader in enumerate(readers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                arrived = task.result()
                if arrived is not None:
                    waiting[_next_of(readers[number])] = number
                    yield number, arrived
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for generation in generations:
            await generation.close()


def _next_of(
    reader: AsyncGenerator[list[Piece], None],
) -> asyncio.Future[list[Piece] | None]:
    async def read() -> list[Piece] | None:
        return await anext(reader, None)

    return asyncio.ensure_future(read())
