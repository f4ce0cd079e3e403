"""What was said so far, and the next answer to it.

Knows messages, sampling settings and the session that answers. Not the terminal or its commands.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_llm.errors import ContextTooLong

if TYPE_CHECKING:
    from mlc_llm.engine.grammar import GrammarSpec
    from mlc_llm.engine.session import ChatSession, RequestStats, SamplingParams
    from mlc_llm.text.events import Content, Reasoning


class Dialogue:
    """A conversation with one model: the messages, and the settings of the next answer.

    shows_thoughts: whether who prints an answer prints its thoughts too. max_thoughts: how many
    tokens of them the next answers may have.
    """

    def __init__(
        self,
        session: ChatSession,
        params: SamplingParams,
        system: str | None,
        shows_thoughts: bool = True,
    ) -> None:
        self.session = session
        self.params = params
        self.format = "text"
        self.shows_thoughts = shows_thoughts
        self.max_thoughts: int | None = None
        self._grammar: GrammarSpec | None = None
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, Any]] = []
        self._images: list[str] = []  # data URLs that go with the next question

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system message, if there is one, and all turns."""
        return [*self._system, *self._turns]

    def set_format(self, text: str) -> None:
        """Let the next answers be in a format: `text`, `json_object`, or a response_format in JSON.

        Raises OptionError or RequestError for what is none, or cannot be enforced.
        """
        from mlc_llm.serve.response_format import read_grammar

        grammar = read_grammar(text)
        if grammar is not None:
            self.session.check_grammar(grammar)
        self.format, self._grammar = text, grammar

    def set_max_thoughts(self, max_thoughts: int | None) -> None:
        """Limit the thoughts of the next answers. Raises RequestError where that can't be."""
        if max_thoughts is not None:
            self.session.check_thought_limit(max_thoughts)
        self.max_thoughts = max_thoughts

    def reset(self) -> None:
        """Forget all turns and images; the system message stays."""
        self._turns, self._images = [], []

    def add_image(self, path: Path) -> None:
        """Send an image with the next question. Raises OptionError or RequestError."""
        self._images.append(self.session.read_image(path))

    def answer(
        self, text: str, note: Callable[[str], None]
    ) -> Generator[Content | Reasoning, None, None]:
        """Yield the answer to `text` piece by piece and keep both as the latest turns.

        Thoughts are kept apart from the answer: the model's template says what becomes of them.
        Where the conversation does not fit the context window, the oldest turns are dropped and
        `note` is told. However the answer ends (also by closing this iterator), what was yielded
        stays in the conversation; a question is taken back that was not answered, or with thoughts
        alone before it was stopped. Raises ContextTooLong if `text` alone does not fit.
        """
        from mlc_llm.text.events import Content

        question = {"role": "user", "content": self._take_content(text)}
        contents: list[str] = []
        thoughts: list[str] = []
        is_whole = False
        stream, kept = self._start(question, note)
        try:
            for piece in stream:
                (contents if isinstance(piece, Content) else thoughts).append(piece.text)
                yield piece
            is_whole = True
        finally:
            stream.close()
            if contents or is_whole:
                reply = {"role": "assistant", "content": "".join(contents)}
                if thoughts:
                    reply["reasoning_content"] = "".join(thoughts)
                self._turns = [*kept, question, reply]

    def _take_content(self, text: str) -> str | list[dict[str, Any]]:
        """Return the content of a question: the text alone, or the images that wait before it."""
        images, self._images = self._images, []
        if not images:
            return text
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in images
        ]
        return [*parts, {"type": "text", "text": text}]

    def _start(
        self, question: dict[str, Any], note: Callable[[str], None]
    ) -> tuple[Generator[Content | Reasoning, None, None], list[dict[str, Any]]]:
        """Return the running answer and the turns that it was given."""
        kept = self._turns
        while True:
            messages = [*self._system, *kept, question]
            stream = self.session.chat(messages, self.params, self._grammar, self.max_thoughts)
            try:
                # The session counts tokens when the first piece is asked for.
                first = next(stream, None)
            except ContextTooLong:
                if not kept:
                    raise
                kept = kept[_num_dropped(len(kept)) :]
                continue
            num_dropped = len(self._turns) - len(kept)
            if num_dropped:
                note(f"the context window is full: the {num_dropped} oldest messages were dropped")
            return _chain(first, stream), kept

    def note_on_ending(self) -> str | None:
        """Return what the user should know about how the last answer ended, if anything."""
        last = self.session.last
        if last is None or last.finish_reason != "length":
            return None
        reply = self._turns[-1] if self._turns else {}
        has_only_thoughts = "reasoning_content" in reply and not reply["content"]
        cut = "the model's thoughts were cut" if has_only_thoughts else "the answer was cut"
        limit = self.params.max_tokens
        if limit is not None and last.completion_tokens >= limit:
            return f"{cut} after {limit:,} tokens; a higher max_tokens allows more"
        size = self.session.context_window_size
        return f"{cut} because the context window of {size:,} tokens is full"


def _num_dropped(num_messages: int) -> int:
    """Return how many of the oldest messages go: whole turns, about a quarter of them.

    Dropping one turn at a time would compute the whole prompt anew at each later question.
    """
    return max(2, (num_messages + 3) // 4 // 2 * 2)


def _chain(
    first: Content | Reasoning | None, rest: Generator[Content | Reasoning, None, None]
) -> Generator[Content | Reasoning, None, None]:
    try:
        if first is not None:
            yield first
        yield from rest
    finally:
        rest.close()


def describe_stats(last: RequestStats | None) -> str:
    """Return the speed and the token counts of the last answer as text."""
    if last is None:
        return "prefill: N/A, decode: N/A (no answer yet)"
    prefill, decode = _speed(last.prefill_tokens_per_s), _speed(last.decode_tokens_per_s)
    return (
        f"prefill: {prefill}, decode: {decode}\n"
        f"prompt: {last.prompt_tokens:,} tokens ({last.cached_tokens:,} of them cached), "
        f"answer: {last.completion_tokens:,} tokens"
    )


def _speed(tokens_per_s: float | None) -> str:
    if tokens_per_s is None or not 0 < tokens_per_s < float("inf"):
        return "N/A"
    return f"{tokens_per_s:,.1f} tok/s"


def describe_params(params: SamplingParams, keys: Mapping[str, Any]) -> str:
    """Return the settings named by `keys` as `key=value;key=value`."""
    return "; ".join(f"{key}={_show(getattr(params, key))}" for key in keys)


def _show(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return ",".join(value) if isinstance(value, tuple) else str(value)
