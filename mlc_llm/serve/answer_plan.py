"""What the answers to a chat may be, and how they are read: from its tools and its reasoning.

Knows the request's wishes and the model's formats. Does not know how answers are written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlc_llm.engine.grammar import GrammarSpec, limit_thoughts
from mlc_llm.errors import RequestError
from mlc_llm.serve.model import ServedModel
from mlc_llm.text.answers import AnswerFormats
from mlc_llm.text.events import AnswerParser
from mlc_llm.text.grammars.limits import TIME_LIMIT_S
from mlc_llm.text.grammars.schema import PARAM as GRAMMAR_PARAM
from mlc_llm.text.grammars.schema import check_schema, parse_schema
from mlc_llm.text.tool_calls import harmony
from mlc_llm.text.tool_calls.grammar import call_grammar
from mlc_llm.text.tool_calls.tools import ToolUse

# Kinds of which a grammar of calls can be a part.
_JSON_KINDS = ("json_object", "json_schema")


@dataclass(frozen=True)
class AnswerPlan:
    """How to make and read the answers to one chat.

    shown: special tokens that the parser reads. is_thinking: the prompt has begun the model's
    thoughts. grammar: what answers must match, None for any text.
    """

    formats: AnswerFormats
    use: ToolUse
    shown: frozenset[int]
    splits_reasoning: bool = True
    is_thinking: bool = False
    holds_calls: bool = True
    grammar: GrammarSpec | None = None

    @property
    def grammar_param(self) -> str:
        """The field of the request that is at fault where the grammar is."""
        return "tools" if self.use.callable_tools else GRAMMAR_PARAM

    @property
    def max_calls(self) -> int:
        """After how many calls an answer ends; 0 for any number."""
        return 0 if self.use.parallel and self.use.name is None else 1

    def open_parser(self) -> AnswerParser | None:
        """Return what reads one answer, None where it is content alone."""
        return self.formats.open_parser(
            self.use.schemas,
            splits_reasoning=self.splits_reasoning,
            is_thinking=self.is_thinking,
            holds_calls=self.holds_calls,
        )


def plan_answers(
    model: ServedModel,
    prompt: list[int],
    use: ToolUse,
    *,
    content_grammar: GrammarSpec | None = None,
    splits_reasoning: bool = True,
    holds_calls: bool = True,
    max_thoughts: int | None = None,
) -> AnswerPlan:
    """Return the plan for the answers to a prompt.

    content_grammar: what an answer must match that calls no tool. holds_calls: see
    `CallFormat.open_parser`. max_thoughts: how many tokens of thoughts an answer may have, None
    for any number. Raises RequestError for schemas that cannot be enforced, and where thoughts are
    to be limited that nothing marks.
    """
    formats = model.prompts.formats
    thoughts = formats.thoughts_after(prompt, model.tokenizer)
    plan = AnswerPlan(
        formats,
        use,
        formats.shown_ids(model.tokenizer),
        splits_reasoning,
        thoughts.are_begun,
        holds_calls,
    )
    grammar = _grammar_of(model, plan, content_grammar)
    if grammar is not None and formats.reasoning is not None and thoughts.are_due:
        grammar = replace(grammar, starts_after=(formats.reasoning.end,))
    if max_thoughts is not None:
        marks = formats.thought_marks
        grammar = limit_thoughts(grammar, max_thoughts, marks, thoughts.are_begun)
    return replace(plan, grammar=grammar)


def _grammar_of(
    model: ServedModel, plan: AnswerPlan, content: GrammarSpec | None
) -> GrammarSpec | None:
    use, shape = plan.use, plan.formats.calls.shape
    schema = None
    if content is not None and use.choice != "required":
        has_channels = plan.formats.calls.reader == "harmony"
        if not use.callable_tools and not has_channels:
            return content
        if not use.callable_tools and content.kind not in _JSON_KINDS:
            return replace(content, starts_after=(harmony.FINAL,), skips_lines=False)
        schema = _schema_of(content)
    special = model.tokenizer.vocabulary.special_ids
    ids = {text: model.tokenizer.token_to_id(text) for text in shape.special}
    token_ids = {text: token for text, token in ids.items() if token in special}
    source = call_grammar(shape, use, token_ids, schema)
    if source is None:
        return None
    # A space before the first text is dropped by some tokenizers; before a token there is none.
    begins_with_token = any((shape.open + shape.begin).startswith(text) for text in token_ids)
    return GrammarSpec("lark", source, continues_text=begins_with_token)


def _schema_of(content: GrammarSpec) -> dict[str, Any] | bool:
    """Return the schema of answers that call no tool. Raises RequestError if there is none."""
    if content.kind == "json_object":
        return {"type": "object"}
    if content.kind not in _JSON_KINDS:
        raise RequestError(
            f"response_format of kind {content.kind} leaves no room for calls of tools; use "
            "json_schema, or tool_choice 'none'",
            "response_format",
        )
    return check_schema(parse_schema(content.source))


async def check_tools(model: ServedModel, use: ToolUse) -> None:
    """Raise RequestError for a schema that is to be enforced and cannot be.

    Each is compiled by itself, since what is wrong in a part of a grammar may show only when an
    answer comes to it. Compiled ones are kept, so this is quick for tools that were seen before.
    All together may take no more time than one grammar: others wait for theirs meanwhile.
    """
    grammars = model.worker.engine.grammars
    spent_s = 0.0
    for tool in use.callable_tools:
        if grammars is not None and (tool.strict or use.choice == "required"):
            with renamed(f"tools[{use.tools.index(tool)}].function.parameters"):
                source = json.dumps(tool.schema, ensure_ascii=False)
                compiled = await grammars.compile_soon(GrammarSpec("json_schema", source))
            spent_s += compiled.read_s
            if spent_s > TIME_LIMIT_S:
                raise RequestError(
                    "the schemas of the tools take too long to read; make them simpler", "tools"
                )


@contextmanager
def renamed(param: str) -> Iterator[None]:
    """Let errors about a grammar, which is of response_format else, name what it was made of."""
    try:
        yield
    except RequestError as error:
        is_named = param == GRAMMAR_PARAM or error.param is None
        if is_named or not str(error.param).startswith(GRAMMAR_PARAM):
            raise
        message = str(error)
        error.args = (f"{param}: {message}", *error.args[1:])
        error.param = param
        raise


def template_variables(
    given: Mapping[str, Any] | None, reasoning: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the model's template is given: chat_template_kwargs, and what was asked by name.

    Raises RequestError where they differ.
    """
    for name, value in reasoning.items():
        if given is not None and given.get(name, value) != value:
            raise RequestError(
                f"chat_template_kwargs sets {name} to {given[name]!r:.80}, another field of the "
                f"request to {value!r}; give one of them",
                f"chat_template_kwargs.{name}",
            )
    return {**(given or {}), **reasoning}
