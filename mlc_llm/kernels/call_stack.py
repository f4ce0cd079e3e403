"""Makes TVM's parser of scripts quick: the call stack without a search for each of its frames.

For every kernel and every call of a macro the parser asks `inspect` for the whole stack. The
standard library then looks through all modules that are loaded, for each frame, to find lines of
source that are used of one frame only. That was half of a compilation, and more in large programs.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from types import FrameType
from typing import Any

from tvm.script.parser.core import parser as macro_parser
from tvm.script.parser.ir import entry as module_entry
from tvm.tirx.script.parser import entry as kernel_entry

# The modules that ask for stacks.
_ASKING = (macro_parser, module_entry, kernel_entry)


def outer_frames(frame: FrameType | None, context: int = 1) -> list[inspect.FrameInfo]:
    """Return a frame and those that called it, as `inspect.getouterframes` does.

    Each has its own line of source alone, whatever `context` says.
    """
    del context
    frames = []
    while frame is not None:
        code, number = frame.f_code, frame.f_lineno
        line = linecache.getline(code.co_filename, number, frame.f_globals)
        lines, index = ([line], 0) if line else (None, None)
        frames.append(
            inspect.FrameInfo(frame, code.co_filename, number, code.co_name, lines, index)
        )
        frame = frame.f_back
    return frames


def stack(context: int = 1) -> list[inspect.FrameInfo]:
    """Return the frames from the caller's on, as `inspect.stack` does."""
    return outer_frames(sys._getframe(1), context)


class _QuickInspect:
    """The module `inspect` with these functions in place of its own."""

    getouterframes = staticmethod(outer_frames)
    stack = staticmethod(stack)

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)


def install() -> None:
    """Have TVM's parser use these functions; it alone, not other users of `inspect`."""
    for module in _ASKING:
        module.inspect = _QuickInspect()
