"""Thoughts before an answer: how models mark them, and how much of them a request asks for.

Knows the marks and the variables of chat templates. gpt-oss's channels are in
tool_calls/harmony.py, since its calls are messages too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from mlc_llm.errors import OptionError, RequestError
from mlc_llm.text.events import AnswerParser, Content, Event, Reasoning, join_events
from mlc_llm.text.tool_calls.reading import Markers

AUTO, NONE = "auto", "none"
ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
_SLICE = 4096


@dataclass(frozen=True)
class ThoughtMarks:
    """Where thoughts are in the text of an answer, and how whoever must end them does so.

    They begin with lead + begin and end with one of `ends`. closing: the text that ends them.
    recurs: they may begin anywhere, more than once; else only where the answer begins. lead: what
    other parts of the answer begin with as well.
    """

    begin: str
    ends: tuple[str, ...]
    closing: str
    lead: str = ""
    recurs: bool = False


@dataclass(frozen=True)
class ReasoningFormat:
    """The texts around a model's thoughts; they are tokens of their own in its vocabulary.

    before_end: what models write before the end.
    """

    name: str
    begin: str
    end: str
    before_end: str = ""

    @property
    def marks(self) -> ThoughtMarks:
        """The marks of thoughts in an answer."""
        return ThoughtMarks(self.begin, (self.end,), self.before_end + self.end)

    def is_open(self, prompt: str) -> bool:
        """Say whether a prompt ends inside of thoughts, so that the answer goes on with them."""
        return prompt.rstrip().endswith(self.begin)

    def is_closed(self, prompt: str) -> bool:
        """Say whether a prompt ends after thoughts, so that there will be none."""
        return prompt.rstrip().endswith(self.end)


_FORMATS = {
    form.name: form
    for form in (
        ReasoningFormat("think", "<think>", "</think>", before_end="\n"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    )
}


def reasoning_names() -> list[str]:
    """Return the names of all formats."""
    return list(_FORMATS)


def find_reasoning(name: str, template: str | None) -> ReasoningFormat | None:
    """Return the format of a name, or for `auto` the one a chat template has marks of.

    None where there is none. Raises OptionError for a name that is not known.
    """
    if name == NONE:
        return None
    if name != AUTO:
        if name not in _FORMATS:
            known = ", ".join((AUTO, NONE, *_FORMATS))
            raise OptionError(f"there is no reasoning parser {name!r}; use one of {known}")
        return _FORMATS[name]
    for form in _FORMATS.values():
        if template is not None and (form.begin in template or form.end in template):
            return form
    return None


class PlainParser:
    """Takes all text for content; an `AnswerParser`."""

    def feed(self, text: str) -> list[Event]:
        """Return the text."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Return nothing: nothing is held back."""
        return []


class ReasoningParser:
    """Tells thoughts from what follows, which another parser reads; an `AnswerParser`.

    The marks and the space beside them are left out. Thoughts are there only where an answer
    begins with them; one that does not end them is nothing but thoughts.
    """

    def __init__(self, form: ReasoningFormat, inner: AnswerParser, is_open: bool = False) -> None:
        """Read an answer that goes on with thoughts which the prompt began, if `is_open`."""
        self._form = form
        self._inner = inner
        self._end = Markers([form.end])
        # What may be a mark, and space that may be beside one.
        self._held = ""
        self._step = self._inside if is_open else self._before
        self._is_open = is_open
        self._has_thoughts = False

    def feed(self, text: str) -> list[Event]:
        """Take more text; return what is now sure."""
        events: list[Event] = []
        for start in range(0, len(text), _SLICE):
            self._step(text[start : start + _SLICE], events)
        return join_events(events)

    def finish(self) -> list[Event]:
        """Return what was held back, now that no text comes any more."""
        held, self._held = self._held, ""
        events: list[Event] = []
        if self._step == self._inside:
            events.append(Reasoning(held if held.strip() else ""))
        elif self._step == self._before:
            events += self._inner.feed(held)
        return join_events([*events, *self._inner.finish()])

    def _before(self, text: str, events: list[Event]) -> None:
        self._held += text
        begun = self._held.lstrip()
        begin = self._form.begin
        if begun.startswith(begin):
            text, self._held = begun[len(begin) :], ""
            self._step = self._inside
            self._inside(text, events)
        elif not begin.startswith(begun) or len(self._held) > _SLICE:
            text, self._held = self._held, ""
            self._step = self._after
            events += self._inner.feed(text)

    def _inside(self, text: str, events: list[Event]) -> None:
        text = self._held + text
        self._held = ""
        if not self._has_thoughts:
            text = text.lstrip()
            if self._is_open and self._form.begin.startswith(text[: len(self._form.begin)]):
                # The mark again, after the one in the prompt; or its beginning.
                if len(text) < len(self._form.begin):
                    self._held = text
                    return
                text = text[len(self._form.begin) :].lstrip()
        place, mark = self._end.find(text)
        if mark:
            events.append(Reasoning(text[:place].rstrip()))
            self._step = self._space
            self._space(text[place + len(mark) :], events)
            return
        sure = text[: len(text) - self._end.num_begun(text)]
        if len(text) <= _SLICE:  # not to go over ever more space again and again
            sure = sure.rstrip()
        self._held = text[len(sure) :]
        if sure:
            self._has_thoughts = True
            events.append(Reasoning(sure))

    def _space(self, text: str, events: list[Event]) -> None:
        if text := text.lstrip():
            self._step = self._after
            events += self._inner.feed(text)

    def _after(self, text: str, events: list[Event]) -> None:
        events += self._inner.feed(text)


def reasoning_variables(
    template: str | None,
    effort: ReasoningEffort | None,
    enable_thinking: bool | None,
    max_thoughts: int | None = None,
) -> dict[str, Any]:
    """Return the variables of a chat template by which it asks for more or less reasoning.

    max_thoughts: tokens of reasoning that are wanted; where nothing else says whether the model is
    to reason, it is unless that is 0. Raises RequestError where the template has no such variable,
    except for asking a model that does not reason not to.
    """
    assert effort is None or effort in get_args(ReasoningEffort)
    source = template or ""
    variables: dict[str, Any] = {}
    if effort is not None:
        if _has_word(source, "reasoning_effort") and not (
            effort == "none" and _has_word(source, "enable_thinking")
        ):
            variables["reasoning_effort"] = effort
        elif _has_word(source, "enable_thinking"):
            variables["enable_thinking"] = effort != "none"
        elif effort != "none":
            raise RequestError(
                f"reasoning_effort is {effort!r}, but the model's chat template has no say in how "
                "much it reasons; leave it out",
                "reasoning_effort",
            )
    names = [name for name in ("enable_thinking", "thinking") if _has_word(source, name)]
    if names and max_thoughts is not None and effort is None and enable_thinking is None:
        enable_thinking = max_thoughts > 0
    if enable_thinking is not None:
        if variables.get("enable_thinking", enable_thinking) != enable_thinking:
            raise RequestError(
                f"enable_thinking is {enable_thinking}, reasoning_effort {effort!r}; give one",
                "enable_thinking",
            )
        if names:
            variables[names[0]] = enable_thinking
        elif enable_thinking:
            raise RequestError(
                "enable_thinking is true, but the model's chat template does not know it; leave it "
                "out",
                "enable_thinking",
            )
    return variables


def _has_word(source: str, word: str) -> bool:
    return re.search(rf"(?<![\w.'\"]){word}(?![\w'\"])", source) is not None


def with_thoughts_by_name(template: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return an assistant's message with its reasoning under the name that a template looks for."""
    thoughts = message.get("reasoning_content")
    named = dict(message)
    if thoughts is not None and re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", template):
        named["thinking"] = thoughts
    return named
