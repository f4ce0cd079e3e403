"""GLM-4.5 to 4.7: a name, then tags around the key and the value of each argument.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

What the schema calls a string is taken as it stands, other values are JSON. A block may have
JSON as in `hermes.py` instead, which is how calls are enforced.
"""

from __future__ import annotations

import json

from mlc_llm.text.tool_calls.json_calls import (
    MAX_NAME_LEN,
    read_calls,
    read_until,
    read_word,
    skip_space,
)
from mlc_llm.text.tool_calls.qwen_xml import MAX_KEY_LEN, read_value, to_json
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading

MARKERS = ("<tool_call>",)
_END = "/tool_call>"  # without its first character, which a key's tag has as well


def read(marker: str, out: CallWriter) -> Reading:
    """Read a block; the end of one with JSON may be missing."""
    char = yield from skip_space((yield))
    if char in "{[":
        yield from read_calls(char, out)
        char = yield from skip_space((yield))
        yield from read_word(f"<{_END}", char)
    else:
        yield from _read_tags(char, out)


def _read_tags(char: str, out: CallWriter) -> Reading:
    name = ""
    while char != "<" and not char.isspace():
        name += char
        if len(name) > MAX_NAME_LEN:
            raise NotACall
        char = yield
    out.start(name)
    schema = out.tools[name]
    keys: set[str] = set()
    out.arguments("{")
    while True:
        char = yield from skip_space(char)
        yield from read_word("<", char)
        char = yield
        if char == "/":
            break
        yield from read_word("arg_key>", char)
        key = yield from read_until("</arg_key>", MAX_KEY_LEN)
        if key in keys:
            raise NotACall
        char = yield from skip_space((yield))
        yield from read_word("<arg_value>", char)
        value = yield from read_value("</arg_value>")
        lead = ", " if keys else ""
        keys.add(key)
        out.arguments(f"{lead}{json.dumps(key, ensure_ascii=False)}: {to_json(value, schema, key)}")
        char = yield
    yield from read_word(_END, char)
    out.arguments("}")
    out.end()
