"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, `[TOOL_CALLS]name[ARGS]{...}`.

The second is newer; each call has a marker of its own there, and may have `[CALL_ID]id`.
"""

from __future__ import annotations

import hashlib
import re

from mlc_llm.text.tool_calls.json_calls import (
    MAX_NAME_LEN,
    read_arguments,
    read_calls,
    read_until,
    skip_space,
)
from mlc_llm.text.tool_calls.reading import CallWriter, NotACall, Reading, new_call_id

MARKERS = ("[TOOL_CALLS]",)
SHOWN = ("[ARGS]", "[CALL_ID]")
_ID = re.compile(r"[A-Za-z0-9]{9}")
_MAX_HEAD_LEN = MAX_NAME_LEN + 64


def read(marker: str, out: CallWriter) -> Reading:
    """Read what follows a marker."""
    char = yield from skip_space((yield))
    if char in "[{":
        yield from read_calls(char, out)
        return
    head = char + (yield from read_until("[ARGS]", _MAX_HEAD_LEN))
    name = head.partition("[CALL_ID]")[0].strip()
    out.check(name)
    char = yield from skip_space((yield))
    if char != "{":
        raise NotACall
    yield from read_arguments(char, out.arguments, lambda: out.start(name))
    out.end()


def new_id() -> str:
    """Return an id of the form that Mistral's templates ask for."""
    return new_call_id(9, prefix="")


def fit_id(call_id: str) -> str:
    """Return an id of that form, the same for the same id; one that has it stays."""
    if _ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
