"""Gemma: a fence ```tool_code with calls in Python's words, or JSON with name and parameters.

Python is read as what it stands for, never run: names, and arguments by keyword that are literals.
"""

from __future__ import annotations

import json
from functools import partial

from mlc_llm.text.tool_calls.json_calls import (
    MAX_NAME_LEN,
    is_unicode,
    read_call,
    read_call_at,
    read_list,
    read_word,
    skip_space,
)
from mlc_llm.text.tool_calls.json_text import is_number
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading

MARKERS = ("```tool_code", "```tool_call", "```json")
_FENCE = "```"
_SPACE = " \t\n\r"
_MAX_DEPTH = 32
_IN_NUMBER = "0123456789+-.eE"
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_HEX_LEN = {"x": 2, "u": 4, "U": 8}
_WORDS = {
    **{"True": "true", "False": "false", "None": "null"},
    **{"true": "true", "false": "false", "null": "null"},
}


def read(marker: str, out: CallWriter) -> Reading:
    """Read a fence, or a bare answer of JSON."""
    char = yield from skip_space((yield))
    while True:
        if char == "{":
            yield from read_call(out, needs_arguments=True)
        elif char == "[":
            char = yield from skip_space((yield))
            is_json = char == "{"
            read_item = (
                partial(read_call_at, out, True) if is_json else partial(_read_statement, out)
            )
            yield from read_list(char, out, read_item)
        elif marker:
            yield from _read_statement(out, char)
        else:
            raise NotACall
        char = yield from skip_space((yield))
        if marker and char == _FENCE[0]:
            yield from read_word(_FENCE, char)
            return
        if char in ",;":
            char = yield from skip_space((yield))


def _read_statement(out: CallWriter, char: str, is_printed: bool = False) -> Reading:
    """Read `name(key=value, ...)`, or that inside of `print(...)`."""
    name = char + (yield from _read_name_until("("))
    if name == "print" and not is_printed:
        char = yield from skip_space((yield))
        yield from _read_statement(out, char, is_printed=True)
        char = yield from skip_space((yield))
        if char != ")":
            raise NotACall
        out.accept()
        return
    out.check(name)
    arguments: dict[str, str] = {}
    char = yield from skip_space((yield))
    while char != ")":
        key = char + (yield from _read_name_until("="))
        if not key.isidentifier() or key in arguments:
            raise NotACall
        char = yield from skip_space((yield))
        value, char = yield from _read_value(char, 0)
        arguments[key] = value
        char = yield from skip_space(char)
        if char == ",":
            char = yield from skip_space((yield))
        elif char != ")":
            raise NotACall
    text = ", ".join(
        f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in arguments.items()
    )
    out.start(name)
    out.arguments("{" + text + "}")
    out.end()


def _read_name_until(stop: str) -> Reading:
    """Return the rest of a name up to `stop`, before which there may be space."""
    name = ""
    char = yield
    while char.isalnum() or char in "_.-":
        name += char
        if len(name) > MAX_NAME_LEN:
            raise NotACall
        char = yield
    char = yield from skip_space(char)
    if char != stop:
        raise NotACall
    return name


def _read_value(char: str, depth: int) -> Reading:
    """Return a literal that begins with `char` as JSON text, and the character after it."""
    if depth > _MAX_DEPTH:
        raise NotACall
    if char in "'\"":
        text, char = yield from _read_string(char)
        return json.dumps(text, ensure_ascii=False), char
    if char in "[(":
        return (yield from _read_items(char, depth))
    if char == "{":
        return (yield from _read_pairs(depth))
    word = ""
    while char in _IN_NUMBER or char.isalpha():
        word += char
        if len(word) > MAX_NAME_LEN:
            raise NotACall
        char = yield
    if word in _WORDS:
        return _WORDS[word], char
    if not is_number(word):
        raise NotACall
    return word, char


def _read_items(opening: str, depth: int) -> Reading:
    closing = "]" if opening == "[" else ")"
    items: list[str] = []
    char = yield from skip_space((yield))
    while char != closing:
        item, char = yield from _read_value(char, depth + 1)
        items.append(item)
        char = yield from skip_space(char)
        if char == ",":
            char = yield from skip_space((yield))
        elif char != closing:
            raise NotACall
    return f"[{', '.join(items)}]", (yield)


def _read_pairs(depth: int) -> Reading:
    pairs: list[str] = []
    char = yield from skip_space((yield))
    while char != "}":
        if char not in "'\"":
            raise NotACall
        key, char = yield from _read_string(char)
        char = yield from skip_space(char)
        if char != ":":
            raise NotACall
        char = yield from skip_space((yield))
        value, char = yield from _read_value(char, depth + 1)
        pairs.append(f"{json.dumps(key, ensure_ascii=False)}: {value}")
        char = yield from skip_space(char)
        if char == ",":
            char = yield from skip_space((yield))
        elif char != "}":
            raise NotACall
    return "{" + ", ".join(pairs) + "}", (yield)


def _read_string(quote: str) -> Reading:
    """Return the text of a string whose first quote was read, and the character after it."""
    char = yield
    stop = quote
    if char == quote:
        char = yield
        if char != quote:
            return "", char
        stop = quote * 3
        char = yield
    text: list[str] = []
    num_quotes = 0
    while True:
        num_quotes = num_quotes + 1 if char == quote else 0
        if num_quotes == len(stop):
            break
        text.append((yield from _read_escape()) if char == "\\" else char)
        char = yield
    joined = "".join(text[: len(text) - len(stop) + 1])
    if not is_unicode(joined):
        raise NotACall
    return joined, (yield)


def _read_escape() -> Reading:
    """Return what stands for a backslash, which was read, and what follows it."""
    char = yield
    if char not in _HEX_LEN:
        return _ESCAPES.get(char, char if char in "'\"\\" else "\\" + char)
    digits = ""
    while len(digits) < _HEX_LEN[char]:
        digits += yield
        if digits[-1] not in "0123456789abcdefABCDEF":
            raise NotACall
    code = int(digits, 16)
    if code > 0x10FFFF:
        raise NotACall
    return chr(code)
