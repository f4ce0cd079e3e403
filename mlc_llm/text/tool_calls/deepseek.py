"""DeepSeek: blocks of special tokens, with the arguments in a fence (V3, R1) or bare (V3.1).

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
```json
{...}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...
"""  # noqa: RUF002

from __future__ import annotations

from mlc_llm.text.tool_calls.json_calls import (
    MAX_NAME_LEN,
    read_arguments,
    read_until,
    read_word,
    skip_space,
)
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading


def _token(name: str) -> str:
    return "<\uff5c" + name.replace(" ", "\u2581") + "\uff5c>"


_CALLS, _CALL = _token("tool calls begin"), _token("tool call begin")
_SEPARATOR, _CALL_END, _CALLS_END = (
    _token("tool sep"),
    _token("tool call end"),
    _token("tool calls end"),
)
MARKERS = (_CALLS, _CALL)
SHOWN = (_SEPARATOR, _CALL_END, _CALLS_END)
_FENCE, _FENCE_END = "```json", "```"


def read(marker: str, out: CallWriter) -> Reading:
    """Read a block of calls, or one call where the beginning of the block is missing."""
    char = yield from skip_space((yield))
    if marker == _CALLS:
        yield from read_word(_CALL, char)
        char = yield
    while True:
        char = yield from _read_call(char, out)
        if char != "<":
            raise NotACall
        # Both that may follow begin alike: another call, or the end of all.
        tag = char + (yield from read_until(">", len(_CALLS_END)))
        if tag + ">" == _CALLS_END:
            return
        if tag + ">" != _CALL:
            raise NotACall
        char = yield


def _read_call(char: str, out: CallWriter) -> Reading:
    """Read a call whose tag was read; return the first character after it that is no space."""
    name = (char + (yield from read_until(_SEPARATOR, MAX_NAME_LEN + 16))).strip()
    char = yield from skip_space((yield))
    has_fence = char != "{"
    if has_fence:
        # What came was the type; then comes the name, on a line of its own.
        if name != "function":
            raise NotACall
        name = (char + (yield from read_until("\n", MAX_NAME_LEN + 16))).strip()
        char = yield from skip_space((yield))
        yield from read_word(_FENCE, char)
        char = yield from skip_space((yield))
    out.check(name)
    yield from read_arguments(char, out.arguments, lambda: out.start(name))
    out.end()
    char = yield from skip_space((yield))
    if has_fence and char == _FENCE_END[0]:
        yield from read_word(_FENCE_END, char)
        char = yield from skip_space((yield))
    yield from read_word(_CALL_END, char)
    out.accept()
    return (yield from skip_space((yield)))
