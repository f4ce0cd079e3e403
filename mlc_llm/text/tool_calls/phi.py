"""Phi-4: `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>` or `functools[...]`."""

from __future__ import annotations

from mlc_llm.text.tool_calls.json_calls import read_calls, read_word, skip_space
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading

MARKERS = ("<|tool_call|>", "functools")
_END = "<|/tool_call|>"
SHOWN = (_END,)


def read(marker: str, out: CallWriter) -> Reading:
    """Read a block; `functools` is a word of Python too, so that a list must follow at once."""
    char = yield
    if marker == "functools":
        if char != "[":
            raise NotACall
        yield from read_calls(char, out)
        return
    char = yield from skip_space(char)
    yield from read_calls(char, out)
    char = yield from skip_space((yield))
    yield from read_word(_END, char)
