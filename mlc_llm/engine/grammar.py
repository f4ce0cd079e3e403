"""Which texts an answer may be: what a request says of it. How it is enforced is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal[
    "json_object", "json_schema", "regex", "choice", "lark", "ebnf", "structural_tag"
]


@dataclass(frozen=True)
class GrammarSpec:
    """What the text of an answer must match, whole.

    source: for json_object nothing; for json_schema the schema as JSON text; for regex the
    expression; for choice a JSON list of texts; for lark a grammar in llguidance's Lark syntax,
    for ebnf one in GBNF (llama.cpp); for structural_tag the JSON text of
    {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}: free text, in which each
    trigger begins one of the structures.

    starts_after: texts, special tokens as the vocabulary spells them (such as "</think>"). Until
    the token that completes one of them the answer is free but may not end; the grammar holds for
    what follows that token. None: it holds from the first token.

    continues_text: whether the answer goes on with a text of the prompt, so that a space it begins
    with is part of it.
    """

    kind: GrammarKind
    source: str = ""
    starts_after: tuple[str, ...] | None = None
    continues_text: bool = False
