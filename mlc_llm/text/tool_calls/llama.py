"""Llama 3.x: an answer that is `{"name": ..., "parameters": {...}}`, or one after `<|python_tag|>`.

Calls of built-in tools in Python's words, which follow the same tag, stay text.
"""

from __future__ import annotations

from mlc_llm.text.tool_calls.json_calls import read_calls, skip_space
from mlc_llm.text.tool_calls.reading import CallWriter, Reading

MARKERS = ("<|python_tag|>",)


def read(marker: str, out: CallWriter) -> Reading:
    """Read calls, one after the other, with semicolons, commas or space between them."""
    char = yield from skip_space((yield))
    while True:
        yield from read_calls(char, out, needs_arguments=not marker)
        char = yield from skip_space((yield))
        if char in ",;":
            char = yield from skip_space((yield))
