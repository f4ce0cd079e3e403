"""JSON as it comes, a character at a time: checked, and repaired where that is safe.

Linear in the text, no recursion. Knows nothing of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

MAX_DEPTH = 64
_SPACE = " \t\n\r"
_DIGITS = "0123456789"
_HEX = frozenset("0123456789abcdefABCDEF")
_IN_NUMBER = frozenset("0123456789+-.eE")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_CLOSERS = {"{": "}", "[": "]"}


class NotJson(Exception):
    """The text is no JSON."""


class JsonText:
    """Checks one JSON value and passes it on.

    Models write two things in strings that JSON does not allow but that have one meaning only:
    control characters and backslashes before ordinary characters. Both are passed on escaped.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._open: list[str] = []  # the brackets that are still to close
        self._step: Callable[[str], str] = self._value
        self._is_key = False
        self._word = ""  # a number or literal so far
        self._num_hex = 0

    def put(self, char: str) -> str:
        """Take the next character; return what is to be passed on for it. Raises NotJson.

        A number outside of brackets is never done, since more of it may come.
        """
        if self.is_done:
            raise NotJson
        return self._step(char)

    def _value(self, char: str) -> str:
        if char in _SPACE:
            return char
        if char in _CLOSERS:
            if len(self._open) == MAX_DEPTH:
                raise NotJson
            self._open.append(_CLOSERS[char])
            self._step = self._first_key if char == "{" else self._first_item
        elif char == '"':
            self._is_key = False
            self._step = self._string
        elif char in _LITERALS:
            self._word = char
            self._step = self._literal
        elif char == "-" or char in _DIGITS:
            self._word = char
            self._step = self._number
        else:
            raise NotJson
        return char

    def _first_item(self, char: str) -> str:
        return self._close(char) if char == "]" else self._value(char)

    def _first_key(self, char: str) -> str:
        return self._close(char) if char == "}" else self._key(char)

    def _key(self, char: str) -> str:
        if char == '"':
            self._is_key = True
            self._step = self._string
        elif char not in _SPACE:
            raise NotJson
        return char

    def _colon(self, char: str) -> str:
        if char == ":":
            self._step = self._value
        elif char not in _SPACE:
            raise NotJson
        return char

    def _after(self, char: str) -> str:
        if char == ",":
            self._step = self._key if self._open[-1] == "}" else self._value
        elif char == self._open[-1]:
            return self._close(char)
        elif char not in _SPACE:
            raise NotJson
        return char

    def _close(self, char: str) -> str:
        self._open.pop()
        self._end_value()
        return char

    def _end_value(self) -> None:
        self._step = self._after
        self.is_done = not self._open

    def _string(self, char: str) -> str:
        if char == '"':
            if self._is_key:
                self._step = self._colon
            else:
                self._end_value()
        elif char == "\\":
            self._step = self._escape
            return ""  # with the next one
        elif char < " ":
            return json.dumps(char)[1:-1]
        return char

    def _escape(self, char: str) -> str:
        self._step = self._string
        if char == "u":
            self._num_hex = 0
            self._step = self._hex
        elif char not in '"\\/bfnrt':
            return "\\\\" + (json.dumps(char)[1:-1] if char < " " else char)
        return "\\" + char

    def _hex(self, char: str) -> str:
        if char not in _HEX:
            raise NotJson
        self._num_hex += 1
        if self._num_hex == 4:
            self._step = self._string
        return char

    def _number(self, char: str) -> str:
        if char in _IN_NUMBER:
            self._word += char
            return char
        if not self._open or not is_number(self._word):
            raise NotJson
        self._end_value()
        return self._after(char)

    def _literal(self, char: str) -> str:
        self._word += char
        whole = _LITERALS[self._word[0]]
        if not whole.startswith(self._word):
            raise NotJson
        if self._word == whole:
            self._end_value()
        return char


def check_object(text: str) -> str | None:
    """Return a text that is one JSON object, repaired, with nothing around it; None for others."""
    text = text.strip(_SPACE)
    if not text.startswith("{"):
        return None
    json_text = JsonText()
    try:
        checked = "".join(json_text.put(char) for char in text)
    except NotJson:
        return None
    return checked if json_text.is_done else None


def is_number(text: str) -> bool:
    """Say whether a text is a number of JSON."""
    return _NUMBER.fullmatch(text) is not None
