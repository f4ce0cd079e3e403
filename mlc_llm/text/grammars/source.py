"""From the kinds of grammars that requests name to llguidance's one form, as JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from mlc_llm.errors import RequestError
from mlc_llm.text.grammars.schema import MAX_SOURCE_CHARS, PARAM, check_schema, parse_schema
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary

MAX_CHOICES = 1_000
MAX_STRUCTURES = 256
# JSON is written as Python's json.dumps does: small models may else go on with spaces for ever,
# and most of what lies between values needs no thought.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANSWER = "answer"
_Part = dict[str, Any]


def read_source(kind: str, source: str, vocabulary: GrammarVocabulary) -> list[_Part]:
    """Return llguidance's parts of a grammar, the first one being the whole; see `GrammarSpec`.

    Raises RequestError that says what is not supported.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise RequestError(
            f"the grammar has {len(source):,} characters, at most {MAX_SOURCE_CHARS:,} may be",
            PARAM,
        )
    if kind == "json_object":
        return [_json_part(_ANSWER, {"type": "object"})]
    if kind == "json_schema":
        return [_json_part(_ANSWER, check_schema(parse_schema(source)))]
    if kind == "regex":
        inner = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]
        return [_lark_part(_ANSWER, inner["lark_grammar"])]
    if kind == "choice":
        return [_lark_part(_ANSWER, _choice(source))]
    if kind in ("lark", "ebnf"):
        return [_lark_part(_ANSWER, source)]
    assert kind == "structural_tag", kind
    return _structural_tag(source, vocabulary)


def join_parts(parts: list[_Part], *, has_first_space: bool = False, has_gap: bool = False) -> str:
    """Return the grammar of parts.

    has_first_space: before the text is a space that is dropped. has_gap: there may be line breaks.
    """
    if has_first_space:
        parts = [_lark_part("with_space", f'start: " " @{_ANSWER}'), *parts]
    elif has_gap:
        parts = [_lark_part("with_gap", f"start: GAP? @{_ANSWER}\nGAP: /\\n{{1,2}}/"), *parts]
    return json.dumps({"grammars": parts})


def _json_part(name: str, schema: dict[str, Any] | bool) -> _Part:
    keywords = {} if isinstance(schema, bool) else schema
    return {"name": name, "json_schema": {**keywords, "x-guidance": _JSON_STYLE}}


def _lark_part(name: str, grammar: str) -> _Part:
    return {"name": name, "lark_grammar": grammar}


def _choice(source: str) -> str:
    choices = json.loads(source)
    if not choices or len(choices) > MAX_CHOICES or not all(choices):
        raise RequestError(
            f"choice must have 1 to {MAX_CHOICES:,} texts, none of them empty", f"{PARAM}.choice"
        )
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)


def _structural_tag(source: str, vocabulary: GrammarVocabulary) -> list[_Part]:
    """Return a grammar of free text in which each trigger begins one of its structures.

    A trigger is a lazy lexeme: what has matched it cannot be read as free text any more.
    """
    spec = parse_schema(source)
    structures, triggers = spec["structures"], spec["triggers"]
    if not structures or not triggers or len(structures) + len(triggers) > MAX_STRUCTURES:
        raise RequestError(
            f"a structural_tag needs structures and triggers, at most {MAX_STRUCTURES} together",
            PARAM,
        )
    literal = _Literals(vocabulary)
    rules, parts = [], []
    bodies: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    for number, structure in enumerate(structures):
        begin = structure["begin"]
        fitting = [trigger for trigger in bodies if trigger and begin.startswith(trigger)]
        if not fitting:
            raise RequestError(
                f"structures[{number}].begin is {begin[:80]!r}, which begins with no trigger", PARAM
            )
        trigger = max(fitting, key=len)
        parts.append(_json_part(f"schema_{number}", check_schema(structure["schema"])))
        rest, end = literal.read(begin[len(trigger) :]), literal.read(structure["end"])
        bodies[trigger].append(f"{rest} @schema_{number} {end}".strip())
    for number, (trigger, options) in enumerate(bodies.items()):
        if not options:
            raise RequestError(f"trigger {trigger[:80]!r} begins no structure", PARAM)
        is_lazy = "" if literal.has_special(trigger) else "[lazy]"
        rules.append(f"trigger_{number}{is_lazy}: TEXT {literal.read(trigger)}")
        rules.append(f"tag_{number}: trigger_{number} ({' | '.join(options)})")
    tags = " | ".join(f"tag_{number}" for number in range(len(bodies)))
    top = "\n".join([f"start: ({tags})* TEXT", r"TEXT: /(.|\n)*/", *rules])
    return [_lark_part(_ANSWER, top), *parts]


class _Literals:
    """Writes texts in Lark, special tokens in them by their ids."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._ids: Mapping[str, int] = vocabulary.special_ids_by_text
        self._split = vocabulary.split_special

    def has_special(self, text: str) -> bool:
        """Return whether a special token is in the text."""
        return any(piece in self._ids for piece in self._split(text))

    def read(self, text: str) -> str:
        """Return a text as Lark writes it, "" for an empty one."""
        return " ".join(
            f"<[{self._ids[piece]}]>"
            if piece in self._ids
            else json.dumps(piece, ensure_ascii=False)
            for piece in self._split(text)
        )
