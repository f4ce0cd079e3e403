"""Calls written as JSON objects, `{"name": ..., "arguments": {...}}`: what most formats share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from mlc_llm.text.tool_calls.json_text import JsonText, NotJson, check_object
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading

MAX_NAME_LEN = 64
_SPACE = " \t\n\r"
_IN_NUMBER = "+-.0123456789eE"
_ARGUMENTS = ("arguments", "parameters")
# Keys that models write beside name and arguments, and that say nothing more.
_IGNORED = ("id", "type", "call_id", "tool_call_id", "index")
_MAX_WORD_LEN = 256  # of keys and names as they are written


def skip_space(char: str) -> Reading:
    """Return the first character that is no space, from `char` on."""
    while char in _SPACE:
        char = yield
    return char


def read_word(word: str, char: str) -> Reading:
    """Read what must be `word`; `char` is its first character."""
    for number, wanted in enumerate(word):
        if number > 0:
            char = yield
        if char != wanted:
            raise NotACall


def read_until(stop: str, max_len: int = _MAX_WORD_LEN) -> Reading:
    """Return the text before `stop`, which is read too; there is no space in it."""
    text = ""
    while not text.endswith(stop):
        if len(text) >= max_len + len(stop) or text[-1:].isspace():
            raise NotACall
        text += yield
    return text[: -len(stop)]


def read_calls(char: str, out: CallWriter, *, needs_arguments: bool = False) -> Reading:
    """Read an object, or a list of them, that begins with `char`."""
    if char == "[":
        char = yield from skip_space((yield))
        yield from read_list(char, out, partial(read_call_at, out, needs_arguments))
    else:
        yield from read_call_at(out, needs_arguments, char)


def read_list(char: str, out: CallWriter, read_item: Callable[[str], Reading]) -> Reading:
    """Read items of which the first begins with `char`, up to the closing bracket."""
    while True:
        yield from read_item(char)
        char = yield from skip_space((yield))
        if char == "]":
            out.accept()
            return
        if char != ",":
            raise NotACall
        char = yield from skip_space((yield))


def read_call_at(out: CallWriter, needs_arguments: bool, char: str) -> Reading:
    """Read an object that is to begin with `char`."""
    if char != "{":
        raise NotACall
    yield from read_call(out, needs_arguments)


def read_call(out: CallWriter, needs_arguments: bool = False, is_inner: bool = False) -> Reading:
    """Read an object whose opening bracket was read."""
    name: str | None = None
    early: list[str] = []  # arguments that came before the name
    has_arguments = has_ended = False
    while True:
        char = yield from skip_space((yield))
        if char != '"':
            raise NotACall
        key = yield from read_string()
        char = yield from skip_space((yield))
        if char != ":":
            raise NotACall
        char = yield from skip_space((yield))
        if has_ended:
            char = yield from _skip_value(char)
        elif key in ("name", "function") and char == '"' and name is None:
            name = yield from read_string()
            out.check(name)
            if has_arguments:
                out.start(name)
                out.arguments("".join(early))
                out.arguments_end()
            char = yield
        elif key in _ARGUMENTS and not has_arguments:
            has_arguments = True
            if name is None:
                yield from read_arguments(char, early.append, lambda: None)
            else:
                start = name

                def begin(name: str = start) -> None:
                    out.start(name)

                yield from read_arguments(char, out.arguments, begin)
                out.arguments_end()
            char = yield
        elif key == "function" and char == "{" and name is None and not is_inner:
            yield from read_call(out, needs_arguments, is_inner=True)
            has_ended = True
            char = yield
        elif key in _IGNORED or (has_arguments and name is not None):
            char = yield from _skip_value(char)
        else:
            raise NotACall
        char = yield from skip_space(char)
        if char == "}":
            break
        if char != ",":
            raise NotACall
    if has_ended:
        out.accept()
        return
    if name is None or (needs_arguments and not has_arguments):
        raise NotACall
    if not has_arguments:
        out.start(name)
        out.arguments("{}")
    out.end()


def read_arguments(char: str, pass_on: Callable[[str], None], begin: Callable[[], None]) -> Reading:
    """Read a value that is an object, the text of one, or null; calls `begin` before it passes on.

    `char` is its first character.
    """
    if char == "{":
        begin()
        yield from read_object(char, pass_on)
        return
    if char == '"':
        text = yield from read_string(max_len=None)
        checked = check_object(text or "{}")
    elif char == "n":
        yield from read_word("null", char)
        checked = "{}"
    else:
        raise NotACall
    if checked is None or not is_unicode(checked):
        raise NotACall
    begin()
    pass_on(checked)


def read_object(char: str, pass_on: Callable[[str], None]) -> Reading:
    """Read a JSON object, or list, that begins with `char`, passing it on as it comes."""
    json_text = JsonText()
    while True:
        try:
            checked = json_text.put(char)
        except NotJson:
            raise NotACall from None
        if checked:
            pass_on(checked)
        if json_text.is_done:
            return
        char = yield


def read_string(max_len: int | None = _MAX_WORD_LEN) -> Reading:
    """Return the text of a JSON string whose opening quote was read."""
    pieces: list[str] = []
    json_text = JsonText()
    json_text.put('"')
    while not json_text.is_done:
        char = yield
        try:
            pieces.append(json_text.put(char))
        except NotJson:
            raise NotACall from None
        if max_len is not None and len(pieces) > max_len:
            raise NotACall
    return str(json.loads('"' + "".join(pieces)))


def is_unicode(text: str) -> bool:
    """Say whether a text can be sent: halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _skip_value(char: str) -> Reading:
    """Read any value that begins with `char`; return the character after it."""
    if char in _IN_NUMBER:
        # What it says does not matter, so neither does whether it is well-formed.
        while char in _IN_NUMBER:
            char = yield
        return char
    json_text = JsonText()
    while True:
        try:
            json_text.put(char)
        except NotJson:
            raise NotACall from None
        char = yield
        if json_text.is_done:
            return char
