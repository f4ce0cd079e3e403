"""Qwen3-Coder and Qwen3.5: tags in place of JSON, values as plain text.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

What the schema calls a string is taken as it stands, other values are JSON. A block may have
JSON as in `hermes.py` instead, which is how calls are enforced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlc_llm.text.tool_calls.json_calls import (
    MAX_NAME_LEN,
    read_calls,
    read_until,
    read_word,
    skip_space,
)
from mlc_llm.text.tool_calls.json_text import JsonText, NotJson
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading

MARKERS = ("<tool_call>",)
MAX_KEY_LEN = 256


def read(marker: str, out: CallWriter) -> Reading:
    """Read a block; its end may be missing."""
    char = yield from skip_space((yield))
    if char in "{[":
        yield from read_calls(char, out)
    else:
        yield from _read_tags(char, out)
    char = yield from skip_space((yield))
    yield from read_word("</tool_call>", char)


def _read_tags(char: str, out: CallWriter) -> Reading:
    yield from read_word("<function=", char)
    name = yield from read_until(">", MAX_NAME_LEN)
    out.start(name)
    schema = out.tools[name]
    keys: set[str] = set()
    out.arguments("{")
    while True:
        char = yield from skip_space((yield))
        if char != "<":
            raise NotACall
        char = yield
        if char == "/":
            break
        yield from read_word("parameter=", char)
        key = yield from read_until(">", MAX_KEY_LEN)
        if key in keys:
            raise NotACall
        lead = ", " if keys else ""
        keys.add(key)
        value = yield from read_value("</parameter>")
        out.arguments(f"{lead}{json.dumps(key, ensure_ascii=False)}: {to_json(value, schema, key)}")
    yield from read_word("/function>", char)
    out.arguments("}")
    out.end()


def read_value(closing: str) -> Reading:
    """Return the text up to the closing tag, without the line breaks at its ends."""
    pieces: list[str] = []
    end = ""  # what has come of the closing tag
    while end != closing:
        char = yield
        pieces.append(char)
        end = end + char if closing.startswith(end + char) else char * (char == "<")
    text = "".join(pieces[: -len(closing)])
    return text.removeprefix("\n").removesuffix("\n")


def to_json(value: str, schema: Mapping[str, Any], key: str) -> str:
    """Return a plain value as JSON, by the type that the schema gives the argument."""
    properties = schema.get("properties")
    declared = properties.get(key) if isinstance(properties, Mapping) else None
    kind = declared.get("type") if isinstance(declared, Mapping) else None
    if kind != "string" and _is_json(value):
        return value
    lowered = value.strip().lower()
    if kind == "boolean" and lowered in ("true", "false"):
        return lowered
    return json.dumps(value, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json_text = JsonText()
        for char in f"[{text}]":
            json_text.put(char)
        # Now it is known not to be too deep; that it is one value and not several is not.
        json.loads(text)
    except (NotJson, ValueError):
        return False
    return True
