"""Which texts an answer may be: what a request says of it. How it is enforced is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mlc_llm.errors import RequestError
from mlc_llm.text.reasoning import ThoughtMarks

GrammarKind = Literal[
    "text", "json_object", "json_schema", "regex", "choice", "lark", "ebnf", "structural_tag"
]


@dataclass(frozen=True)
class ThoughtLimit:
    """How many tokens of thoughts an answer may have; then the text that ends them is forced.

    is_open: the prompt has begun the thoughts.
    """

    max_tokens: int
    marks: ThoughtMarks
    is_open: bool = False


@dataclass(frozen=True)
class GrammarSpec:
    """What the text of an answer must match, whole.

    source: for text, which may be anything, and for json_object nothing; for json_schema the schema
    as JSON text; for regex the expression; for choice a JSON list of texts; for lark a grammar in
    llguidance's Lark syntax, for ebnf one in GBNF (llama.cpp); for structural_tag the JSON text of
    {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}: free text, in which each
    trigger begins one of the structures.

    starts_after: texts, special tokens as the vocabulary spells them (such as "</think>"). Until
    the token that completes one of them the answer is free but may not end; the grammar holds for
    what follows that token, after up to two line breaks if skips_lines. None: it holds from the
    first token.

    continues_text: whether the answer goes on with a text of the prompt, so that a space it begins
    with is part of it.

    thoughts: the limit of what is thought before the answer; None for as much as there is.
    """

    kind: GrammarKind
    source: str = ""
    starts_after: tuple[str, ...] | None = None
    skips_lines: bool = True
    continues_text: bool = False
    thoughts: ThoughtLimit | None = None


def limit_thoughts(
    grammar: GrammarSpec | None, max_tokens: int, marks: ThoughtMarks | None, is_open: bool
) -> GrammarSpec:
    """Return a grammar with a limit of an answer's thoughts, see `ThoughtLimit`.

    Raises RequestError where a model marks none.
    """
    if marks is None:
        raise RequestError(
            f"thinking_token_budget is {max_tokens:,}, but nothing marks what this model "
            "thinks; leave it out",
            "thinking_token_budget",
        )
    limit = ThoughtLimit(max_tokens, marks, is_open)
    return replace(grammar or GrammarSpec("text"), thoughts=limit)
