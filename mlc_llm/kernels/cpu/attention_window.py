"""Which keys a query sees: those up to its own, within a window or chunk, and the first ones.

Conditions on positions for `attention.py` and `attention_block.py`; knows no pages.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import KEY_BLOCK, AttentionShape
from mlc_llm.kernels.cpu.vector_math import splat


def is_needed(start: Any, count: int, position: Any, shape: AttentionShape) -> Any:
    """Return whether a query from `position` on sees some of the `count` keys from `start` on."""
    if shape.window <= 0:
        return T.bool(True)
    return T.Or(start + count > shape.first_key(position), start < shape.sinks)


def first_block(position: Any, shape: AttentionShape) -> Any:
    """Return the first key of the first block that a query at `position` needs."""
    if shape.window <= 0 or shape.sinks > 0:
        return T.int32(0)
    return T.max(shape.first_key(position), 0) // KEY_BLOCK * KEY_BLOCK


def needs_mask(start: Any, first: Any, last: Any, shape: AttentionShape) -> Any:
    """Return whether a query of positions first .. last does not see all keys of a block."""
    above = start + KEY_BLOCK - 1 > first
    return above if shape.window <= 0 else T.Or(above, start < shape.first_key(last))


def visible(keys: Any, position: Any, shape: AttentionShape) -> Any:
    """Return a mask: which of 16 keys the query at `position` sees."""
    mask = keys <= splat(position)
    if shape.window > 0:
        recent = keys >= splat(shape.first_key(position))
        mask = T.bitwise_and(mask, T.bitwise_or(recent, keys < splat(T.int32(shape.sinks))))
    return mask
