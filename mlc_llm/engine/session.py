"""A conversation of one user with a model: prompt in, text out, on an engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.config import EngineConfig
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar import GrammarSpec, limit_thoughts
from mlc_llm.engine.metrics import RequestStats
from mlc_llm.engine.open import open_model
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import RequestError
from mlc_llm.images.inputs import PromptImage
from mlc_llm.text.events import Content, Event, Reasoning, join_events
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.reasoning import PlainParser
from mlc_llm.text.stream import TextStream
from mlc_llm.text.tokenizer import Tokenizer

__all__ = ["ChatSession", "RequestStats", "SamplingParams"]


class ChatSession:
    """One user's session: one answer at a time, from one thread at a time.

    Earlier turns stay in the engine's prefix cache.
    """

    def __init__(
        self, config: ChatConfig, tokenizer: Tokenizer, prompts: PromptBuilder, engine: Engine
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.last: RequestStats | None = None
        self._prompts = prompts
        self._engine = engine
        self._num_requests = 0
        self._is_generating = False

    @classmethod
    def open(
        cls,
        artifact: Path,
        library: Path,
        *,
        device: str = "auto",
        overrides: Mapping[str, Any] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> ChatSession:
        """Load an artifact and its library, see `open_model`.

        A context that `overrides` ask for is had or refused; the model's own gives way to memory.
        """
        asked = (overrides or {}).get("context_window_size")
        model = open_model(
            artifact,
            library,
            EngineConfig(mode="interactive", max_single_sequence_length=asked),
            device=device,
            overrides=overrides,
            progress=progress,
        )
        return cls(model.config, model.tokenizer, model.prompts, model.engine)

    @property
    def context_window_size(self) -> int:
        """Tokens a conversation may have, answer included."""
        return self._engine.max_sequence_len

    def read_image(self, path: Path) -> str:
        """Return an image file as a message has it, see `PromptBuilder.read_image`."""
        return self._prompts.read_image(path)

    def check_grammar(self, grammar: GrammarSpec) -> None:
        """Raise RequestError unless answers can be held to a grammar."""
        if self._prompts.formats.splits_channels:
            raise RequestError(
                "this model answers on channels, which `mlc_llm chat` cannot hold to a format; "
                "use `mlc_llm serve`",
                "response_format",
            )
        self._compile(grammar)

    def check_thought_limit(self, max_tokens: int) -> None:
        """Raise RequestError unless an answer's thoughts can be held to a number of tokens."""
        self._compile(limit_thoughts(None, max_tokens, self._prompts.formats.thought_marks, False))

    def _compile(self, grammar: GrammarSpec) -> None:
        if self._engine.grammars is not None:
            self._engine.grammars.compile(grammar)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        grammar: GrammarSpec | None = None,
        max_thoughts: int | None = None,
    ) -> Generator[Content | Reasoning, None, None]:
        """Answer a conversation piece by piece; closing the iterator stops the work.

        grammar: what the answer must match, after the model's thoughts where it has such, of which
        there are at most max_thoughts tokens. Raises ContextTooLong, TemplateError or RequestError,
        before the first piece.
        """
        prompt = self._prompts.build(messages)
        formats = self._prompts.formats
        thoughts = formats.thoughts_after(prompt.token_ids, self.tokenizer)
        if grammar is not None:
            self.check_grammar(grammar)
            if formats.reasoning is not None and thoughts.are_due:
                grammar = replace(grammar, starts_after=(formats.reasoning.end,))
        if max_thoughts is not None:
            marks = formats.thought_marks
            grammar = limit_thoughts(grammar, max_thoughts, marks, thoughts.are_begun)
        parser = formats.open_parser({}, is_thinking=thoughts.are_begun)
        shown = frozenset[int]() if parser is None else formats.shown_ids(self.tokenizer)
        parser = parser or PlainParser()
        stops = (*self._prompts.stop_strings, *params.stop)
        stream = TextStream(self.tokenizer, stops, shown=shown)
        tokens = self.generate(prompt.token_ids, params, prompt.images, grammar)
        try:
            for token in tokens:
                yield from _said(parser.feed(stream.put(token)))
                if stream.stopped:
                    self._engine.abort(self._request_id, "stop")
                    break
            yield from _said([*parser.feed(stream.finish()), *parser.finish()])
        finally:
            tokens.close()

    def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        images: tuple[PromptImage, ...] = (),
        grammar: GrammarSpec | None = None,
    ) -> Generator[int, None, None]:
        """Continue tokens; stop tokens end the iteration and are not part of it.

        Raises ContextTooLong where the prompt leaves no room, RequestError for bad tokens.
        """
        stops = frozenset() if params.ignore_eos else self._prompts.stop_token_ids
        request = Request(
            f"chat-{self._num_requests + 1}",
            list(token_ids),
            params,
            stop_token_ids=stops,
            images=images,
            grammar=grammar,
        )
        self._engine.check(request)
        return self._generate(request)

    def _generate(self, request: Request) -> Generator[int, None, None]:
        if self._is_generating:
            raise RequestError(
                "the session is still answering another request; finish it or close its iterator"
            )
        self._is_generating = True
        self._num_requests += 1
        self._request_id = request.request_id
        self.last = self._engine.add(request)
        try:
            while True:
                for output in self._engine.step():
                    if output.request_id != request.request_id:
                        continue  # the end of an earlier answer that was abandoned
                    if output.error is not None:
                        raise output.error
                    if output.token_id is not None:
                        yield output.token_id
                    if output.finish_reason is not None:
                        return
        finally:
            self._is_generating = False
            self._engine.abort(request.request_id)

    def metrics_text(self) -> str:
        """Return sums over all requests as Prometheus text."""
        return self._engine.metrics.prometheus_text(with_histograms=False)

    def close(self) -> None:
        """Free the model and end helper processes."""
        self._prompts.close()
        self._engine.close()


def _said(events: Iterable[Event]) -> Iterator[Content | Reasoning]:
    """Yield what there is to read; without tools, nothing else is there."""
    return (event for event in join_events(events) if isinstance(event, Content | Reasoning))
