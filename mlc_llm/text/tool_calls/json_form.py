"""The generic form: an answer that is a JSON object, or a list of them, or has one in a fence.

For models that were taught no form of their own, and are told of this one.
"""

from __future__ import annotations

from mlc_llm.text.tool_calls.json_calls import read_calls, read_word, skip_space
from mlc_llm.text.tool_calls.reading import CallWriter, Reading

MARKERS = ("```json", "<tool_call>")
_ENDS = {"```json": "```", "<tool_call>": "</tool_call>"}


def read(marker: str, out: CallWriter) -> Reading:
    """Read calls, one after the other; more may follow after a comma, a semicolon or space."""
    # An answer in JSON is usual, so that one without arguments is taken for just that.
    char = yield from skip_space((yield))
    yield from read_calls(char, out, needs_arguments=True)
    end = _ENDS.get(marker, "")
    while True:
        char = yield from skip_space((yield))
        if end and char == end[0]:
            yield from read_word(end, char)
            return
        if char in ",;":
            char = yield from skip_space((yield))
        yield from read_calls(char, out, needs_arguments=True)
