"""A chat session that answers from a list, for tests of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.errors import ContextTooLong, OptionError, RequestError
from mlc_llm.text.events import Content, Reasoning

Piece = str | Reasoning | BaseException

CONFIG = ChatConfig(
    model_type="llama",
    quantization="q0f32",
    model_config={},
    vocab_size=32,
    context_window_size=64,
    prefill_chunk_size=64,
    conv_template={},
)


@dataclasses.dataclass
class FakeStats:
    """What the session says about its last answer."""

    prompt_tokens: int = 12
    cached_tokens: int = 4
    completion_tokens: int = 3
    finish_reason: str = "stop"
    prefill_tokens_per_s: float = 100.0
    decode_tokens_per_s: float = 20.5


class FakeSession:
    """Yields the pieces of one scripted answer per question; an exception among them is raised.

    A text among them is content.

    A prompt whose messages hold more than `max_chars` characters is too long.
    """

    def __init__(self, answers: Sequence[Sequence[Piece]], max_chars: int = 10**6):
        self.config = CONFIG
        self.context_window_size = CONFIG.context_window_size
        self.last: FakeStats | None = None
        self.finish_reason = "stop"
        self.max_chars = max_chars
        self.prompts: list[list[dict[str, str]]] = []
        self.params: list[Any] = []
        self.grammars: list[GrammarSpec | None] = []
        self.max_thoughts: list[int | None] = []
        self.has_thoughts = True
        self.num_stopped = 0
        self.is_closed = False
        self._answers = list(answers)

    def read_image(self, path: Path) -> str:
        return f"data:{path}"

    def check_grammar(self, grammar: GrammarSpec) -> None:
        if grammar.kind == "regex":
            raise RequestError("no expressions here")

    def check_thought_limit(self, max_tokens: int) -> None:
        if not self.has_thoughts:
            raise RequestError("no thoughts here")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: Any,
        grammar: GrammarSpec | None = None,
        max_thoughts: int | None = None,
    ) -> Iterator[Content | Reasoning]:
        self.grammars.append(grammar)
        self.max_thoughts.append(max_thoughts)
        num_chars = sum(len(message["content"]) for message in messages)
        if num_chars > self.max_chars:
            raise ContextTooLong(f"prompt has {num_chars} characters")
        self.prompts.append([dict(message) for message in messages])
        self.params.append(params)
        try:
            for piece in self._answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield Content(piece) if isinstance(piece, str) else piece
        except GeneratorExit:
            self.num_stopped += 1
            raise
        self.last = FakeStats(finish_reason=self.finish_reason)

    def metrics_text(self) -> str:
        return "# TYPE tokens counter\ntokens 3\n"

    def close(self) -> None:
        self.is_closed = True


@dataclasses.dataclass(frozen=True)
class FakeParams:
    """Sampling settings without the rules of the real ones, but for one."""

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise OptionError(f"temperature is {self.temperature}; it must not be negative")
