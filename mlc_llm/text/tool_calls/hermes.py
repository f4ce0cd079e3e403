"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one block a call.

SmolLM2 and others write a list in one block.
"""

from __future__ import annotations

from mlc_llm.text.tool_calls.json_calls import read_calls, read_word, skip_space
from mlc_llm.text.tool_calls.reading import CallWriter, Reading

MARKERS = ("<tool_call>",)
_END = "</tool_call>"


def read(marker: str, out: CallWriter) -> Reading:
    """Read a block; its end may be missing."""
    char = yield from skip_space((yield))
    yield from read_calls(char, out)
    char = yield from skip_space((yield))
    yield from read_word(_END, char)
