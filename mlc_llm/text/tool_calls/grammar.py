"""From tools to a grammar of answers that call them, in llguidance's Lark syntax.

A pure function of texts; what compiles and enforces grammars is elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlc_llm.text.tool_calls.tools import CallShape, Tool, ToolUse

MAX_CALLS = 16  # of one answer: a model that never ends its list would fill the context
# One way to write each value, so that no answer is all space.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_HARMONY_START = "<|start|>"
_HARMONY_TURN = "<|end|><|start|>assistant"


def call_grammar(
    shape: CallShape,
    use: ToolUse,
    token_ids: Mapping[str, int],
    content: Mapping[str, Any] | bool | None = None,
) -> str | None:
    """Return the grammar that answers must match, or None where they are free.

    token_ids: those of the texts in `shape.special` that are special tokens of the vocabulary,
    which no text can spell. With the choice `required`, the answer is one call or more; with
    `auto` it is free text in which calls of strict tools keep to their schemas, or the whole
    answer is such calls. content: the schema of an answer that is no call, where it has one.
    """
    tools = use.callable_tools
    is_free = use.choice != "required" and content is None
    if (is_free and not any(tool.strict for tool in tools)) or not (tools or content is not None):
        return None
    limit = MAX_CALLS if use.parallel and use.name is None else 1
    writer = _Writer(shape, token_ids)
    rules = ["%llguidance {}"]
    if use.choice == "required":
        rules += writer.required(limit)
    elif content is None:
        rules += writer.free_text(limit)
    elif tools and not shape.trigger and _HARMONY_START not in shape.special:
        # Calls are JSON too, so what comes after a bracket tells which it is.
        options = [_call_schema(shape, tool, bound=tool.strict) for tool in tools] + [content]
        return "\n".join([*rules, f"start: %json {json.dumps(_any_of(options))}", ""])
    else:
        rules += writer.calls_or_json(limit, content, has_tools=bool(tools))
    if not tools:
        return "\n".join([*rules, ""])
    for number, tool in enumerate(tools):
        is_bound = tool.strict or use.choice != "auto"
        rules += writer.tool(number, tool, tool.schema if is_bound else _ANY_OBJECT)
    for rule in ("call", "rest"):
        rules.append(f"{rule}: " + " | ".join(f"{rule}_{number}" for number in range(len(tools))))
    return "\n".join([*rules, ""])


class _Writer:
    """Writes rules for one shape."""

    def __init__(self, shape: CallShape, token_ids: Mapping[str, int]) -> None:
        self._shape = shape
        self._token_ids = token_ids

    def required(self, limit: int) -> list[str]:
        """Return the rules of an answer that is calls."""
        shape = self._shape
        calls = self._list_of("call", limit)
        start = f"start: {self._join(self._text(shape.open), calls, self._text(shape.close))}"
        if _HARMONY_START not in shape.special:
            return [start]
        # Its reasoning is a message before the call, so it is part of the grammar.
        return [
            f"start: thought? {calls}",
            f"thought: {self._text('<|channel|>analysis<|message|>')} TEXT "
            f"{self._text(_HARMONY_TURN)}",
            "TEXT: /(.|\\n)*/",
        ]

    def free_text(self, limit: int) -> list[str]:
        """Return the rules of an answer that may have calls."""
        shape = self._shape
        text = "TEXT: /(.|\\n)*/"
        calls = self._list_of("call", limit)
        if _HARMONY_START in shape.special:
            # What is addressed to a function is a call; other messages are free.
            message = self._text("<|message|>")
            return [
                f"start: (message {self._text(_HARMONY_TURN)})* (message | {calls})",
                f"message: {self._text('<|channel|>')} CHANNEL {message} TEXT",
                'CHANNEL: "analysis" | "commentary" | "final"',
                text,
            ]
        if not shape.trigger:
            # The first character decides.
            return [
                f"start: {calls} | FREE?",
                "FREE: /[ \\n]*[^\\[{ \\n](.|\\n)*/",
            ]
        head, rest = shape.trigger, (shape.open + shape.begin).removeprefix(shape.trigger)
        if head in self._token_ids:
            before = f"before: TEXT {self._text(head)}"
        else:
            before = f"before[lazy]: /(.|\\n)*/ {self._text(head)}"
        # Where each call has the trigger, more calls are more blocks.
        more = self._more("call", limit) if shape.open else ""
        block = self._join("before", self._text(rest), "rest", more, self._text(shape.close))
        repeat = "?" if limit == 1 else f"{{0,{MAX_CALLS}}}"
        return [f"start: block{repeat} TEXT", f"block: {block}", before, text]

    def calls_or_json(
        self, limit: int, schema: Mapping[str, Any] | bool, *, has_tools: bool
    ) -> list[str]:
        """Return the rules of an answer that is calls or JSON."""
        shape = self._shape
        written = schema if isinstance(schema, bool) else {**schema, "x-guidance": _SPACING}
        json_rule = f"json: %json {json.dumps(written)}"
        calls = self._join(
            self._text(shape.open), self._list_of("call", limit), self._text(shape.close)
        )
        if _HARMONY_START not in shape.special:
            return [f"start: {calls} | json" if has_tools else "start: json", json_rule]
        message = self._text("<|message|>")
        return [
            f"start: thought* ({calls} | final)" if has_tools else "start: thought* final",
            f"thought: {self._text('<|channel|>')} CHANNEL {message} TEXT "
            f"{self._text(_HARMONY_TURN)}",
            f"final: {self._text('<|channel|>final<|message|>')} json",
            'CHANNEL: "analysis" | "commentary"',
            "TEXT: /(.|\\n)*/",
            json_rule,
        ]

    def tool(self, number: int, tool: Tool, schema: Mapping[str, Any]) -> list[str]:
        """Return the rules of calls of one tool."""
        shape = self._shape
        middle = self._text(tool.name + shape.middle)
        return [
            f"call_{number}: {self._text(shape.begin)} rest_{number}",
            f"rest_{number}: {middle} arguments_{number} {self._text(shape.end)}",
            f"arguments_{number}: %json {json.dumps(_closed(schema))}",
        ]

    def _list_of(self, rule: str, limit: int) -> str:
        return self._join(rule, self._more(rule, limit))

    def _more(self, rule: str, limit: int) -> str:
        if limit == 1:
            return ""
        return f"({self._join(self._text(self._shape.separator), rule)}){{0,{limit - 1}}}"

    def _text(self, text: str) -> str:
        """Return a text as terminals: strings, and the ids of special tokens."""
        parts: list[str] = []
        while text:
            place, token = min(
                (
                    (text.find(token), token)
                    for token in self._token_ids
                    if token in self._shape.special and token in text
                ),
                default=(len(text), ""),
            )
            if place:
                parts.append(json.dumps(text[:place], ensure_ascii=False))
            if token:
                parts.append(f"<[{self._token_ids[token]}]>")
            text = text[place + len(token) :]
        return " ".join(parts)

    @staticmethod
    def _join(*parts: str) -> str:
        return " ".join(part for part in parts if part)


def _call_schema(shape: CallShape, tool: Tool, *, bound: bool) -> dict[str, Any]:
    """Return the schema of a call in a shape that is one JSON object."""
    key = shape.middle.split('"')[-2]
    arguments = _moved(_closed(tool.schema) if bound else _ANY_OBJECT, f"#/properties/{key}")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _any_of(options: Sequence[Mapping[str, Any] | bool]) -> dict[str, Any]:
    moved = [_moved(option, f"#/anyOf/{place}") for place, option in enumerate(options)]
    return {"anyOf": moved, "x-guidance": _SPACING}


def _moved(value: Any, to: str) -> Any:
    """Return a schema whose references are right when it is put where the pointer `to` says."""
    if isinstance(value, list):
        return [_moved(item, to) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: to + item.removeprefix("#")
        if key == "$ref" and isinstance(item, str)
        else _moved(item, to)
        for key, item in value.items()
        if key != "x-guidance"
    }


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have no more properties than it names, written one way."""
    closed = dict(schema)
    composed = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties")
    if "properties" in closed and not any(name in closed for name in composed):
        closed["additionalProperties"] = False
    closed["x-guidance"] = _SPACING
    return closed
