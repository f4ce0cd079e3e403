"""How the answers of one model are read: its format of calls and its marks of reasoning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlc_llm.text.events import AnswerParser
from mlc_llm.text.reasoning import (
    AUTO,
    NONE,
    PlainParser,
    ReasoningFormat,
    ReasoningParser,
    ThoughtMarks,
    find_reasoning,
)
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.text.tool_calls import deepseek, harmony, mistral, phi
from mlc_llm.text.tool_calls.registry import CallFormat, detect_format, get_format

# Texts that readers look for beside the marks of calls, by reader.
_SHOWN = {
    "deepseek": deepseek.SHOWN,
    "mistral": mistral.SHOWN,
    "phi": phi.SHOWN,
    "harmony": harmony.SHOWN,
}
_CHANNELS = ThoughtMarks(
    f"analysis{harmony.MESSAGE}",
    (harmony.END, harmony.CALL, harmony.RETURN, harmony.START, harmony.CHANNEL),
    closing=f"{harmony.END}{harmony.START}assistant",
    lead=harmony.CHANNEL,
    recurs=True,
)
# Tokens at the end of a prompt that tell whether it has begun or ended the model's thoughts.
_TAIL = 16


@dataclass(frozen=True)
class ThoughtsAhead:
    """What follows a prompt: thoughts that it has begun, or any, which the model may begin too."""

    are_begun: bool = False
    are_due: bool = False


@dataclass(frozen=True)
class AnswerFormats:
    """The formats of a model's answers.

    reasoning: None where it marks no thoughts, and where channels do (gpt_oss). thinks_first: the
    model begins its thoughts itself, unless a prompt ends them.
    """

    calls: CallFormat
    reasoning: ReasoningFormat | None
    splits_channels: bool = False
    thinks_first: bool = False

    @classmethod
    def find(
        cls,
        template: str | None,
        model_type: str = "",
        tool_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> AnswerFormats:
        """Return the formats of these names, `auto` being the model's own.

        template: the text of its chat template. Raises OptionError for names that are not known.
        """
        own = detect_format(template, model_type)
        calls = own if tool_parser == AUTO else get_format(tool_parser)
        is_harmony = calls.reader == "harmony"
        reasoning = find_reasoning(reasoning_parser, template)
        return cls(
            calls,
            None if is_harmony else reasoning,
            splits_channels=is_harmony and reasoning_parser != NONE,
            # Templates that can be told not to let the model think are of models that do.
            thinks_first=reasoning is not None and "enable_thinking" in (template or ""),
        )

    @property
    def thought_marks(self) -> ThoughtMarks | None:
        """Where thoughts are in an answer, None where nothing marks them."""
        if self.splits_channels:
            return _CHANNELS
        return None if self.reasoning is None else self.reasoning.marks

    @property
    def splits_reasoning(self) -> bool:
        """Whether thoughts can be told from answers."""
        return self.splits_channels or self.reasoning is not None

    def open_parser(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        *,
        splits_reasoning: bool = True,
        is_thinking: bool = False,
        holds_calls: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> AnswerParser | None:
        """Return a parser for one answer, None for one that is nothing but content.

        tools: the schemas of what it may call, by name. is_thinking: the prompt has begun its
        thoughts. See `CallFormat.open_parser` for the others.
        """
        has_thoughts = splits_reasoning and self.splits_reasoning
        if not tools and not has_thoughts:
            return None
        inner: AnswerParser = PlainParser()
        if tools or self.splits_channels:
            inner = self.calls.open_parser(tools, holds_calls=holds_calls, new_id=new_id)
        if has_thoughts and self.reasoning is not None:
            return ReasoningParser(self.reasoning, inner, is_thinking)
        return inner

    def thoughts_after(self, prompt: Sequence[int], tokenizer: Tokenizer) -> ThoughtsAhead:
        """Return what of the thoughts between marks is to come after a prompt."""
        marks = self.reasoning
        if marks is None:
            return ThoughtsAhead()
        tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
        if marks.is_open(tail):
            return ThoughtsAhead(are_begun=True, are_due=True)
        return ThoughtsAhead(are_due=self.thinks_first and not marks.is_closed(tail))

    def shown_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the tokens of `shown_texts`."""
        found = (tokenizer.token_to_id(text) for text in self.shown_texts)
        return frozenset(token_id for token_id in found if token_id is not None)

    @property
    def shown_texts(self) -> tuple[str, ...]:
        """Texts that a parser has to see, though they may be special tokens."""
        shown = (*self.calls.shape.special, *_SHOWN.get(self.calls.reader, ()))
        if self.reasoning is not None:
            shown += (self.reasoning.begin, self.reasoning.end)
        return tuple(dict.fromkeys(shown))
