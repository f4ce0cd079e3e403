"""Rotary embedding of queries and keys (Su et al. 2021), as computations without a schedule."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from mlc_llm.kernels.gpu.rows import (
    RowCount,
    computation,
    compute,
    constant,
    narrow,
    num_rows,
    tensor,
    wide,
)

_TURN = 2 * math.pi
# A turn in two parts, so that taking turns off a large angle loses nothing: 6.28125 has few bits.
_TURN_HIGH = 6.28125
_TURN_LOW = _TURN - _TURN_HIGH


def rotate(
    n: RowCount,
    shape: tuple[int, int, int],
    rotary_dim: int,
    is_interleaved: bool,
    scale: float,
    dtype: str,
) -> Any:
    """Rotate: x (n, (turned + kept) * head_dim), positions (n) int32, inverse frequencies
    (rotary_dim / 2) float32 -> as x.

    shape: heads that are turned, heads that are kept, head_dim. Of each turned head the first
    `rotary_dim` items are, pairs being halves or, if interleaved, neighbours. scale: what
    cosines and sines are multiplied with.
    """
    turned, kept, head_dim = shape
    rows, width, half = num_rows(n), (turned + kept) * head_dim, rotary_dim // 2
    x = tensor("x", (rows, width), dtype)
    positions = tensor("positions", (rows,), "int32")
    frequencies = tensor("frequencies", (half,), "float32")

    def item(i: Any, c: Any) -> Any:
        d = c % head_dim
        pair = d // 2 if is_interleaved else d % half
        is_first = d % 2 == 0 if is_interleaved else d < half
        other = 1 if is_interleaved else half
        angle = _within_a_turn(tirx.Cast("float32", positions[i]) * frequencies[pair])
        sine = tirx.sin(angle)
        partner = tirx.if_then_else(
            is_first, constant(-1) * wide(x[i, c + other]), wide(x[i, c - other])
        )
        value = (wide(x[i, c]) * tirx.cos(angle) + partner * sine) * constant(scale)
        is_turned = tirx.all(c < turned * head_dim, d < rotary_dim)
        return tirx.if_then_else(is_turned, narrow(value, dtype), x[i, c])

    out = compute((rows, width), item, name="out")
    return computation([x, positions, frequencies, out])


def rotate_by_table(
    n: RowCount, shape: tuple[int, int, int], rotary_dim: int, is_interleaved: bool, dtype: str
) -> Any:
    """Rotate as `rotate` does, with cosines and sines (n, rotary_dim) float32 of `rope_table`."""
    turned, kept, head_dim = shape
    rows, width, half = num_rows(n), (turned + kept) * head_dim, rotary_dim // 2
    x = tensor("x", (rows, width), dtype)
    table = tensor("table", (rows, rotary_dim), "float32")

    def item(i: Any, c: Any) -> Any:
        d = c % head_dim
        pair = d // 2 if is_interleaved else d % half
        is_first = d % 2 == 0 if is_interleaved else d < half
        other = 1 if is_interleaved else half
        partner = tirx.if_then_else(
            is_first, constant(-1) * wide(x[i, c + other]), wide(x[i, c - other])
        )
        value = wide(x[i, c]) * table[i, pair] + partner * table[i, half + pair]
        is_turned = tirx.all(c < turned * head_dim, d < rotary_dim)
        return tirx.if_then_else(is_turned, narrow(value, dtype), x[i, c])

    out = compute((rows, width), item, name="out")
    return computation([x, table, out])


def rope_table(n: RowCount, rotary_dim: int, scale: float) -> Any:
    """Tabulate angles: positions (n) int32, inverse frequencies (rotary_dim / 2) float32
    -> (n, rotary_dim) float32, cosines then sines, each times `scale`.
    """
    rows, half = num_rows(n), rotary_dim // 2
    positions = tensor("positions", (rows,), "int32")
    frequencies = tensor("frequencies", (half,), "float32")

    def item(i: Any, c: Any) -> Any:
        angle = _within_a_turn(tirx.Cast("float32", positions[i]) * frequencies[c % half])
        return tirx.if_then_else(c < half, tirx.cos(angle), tirx.sin(angle)) * constant(scale)

    out = compute((rows, rotary_dim), item, name="out")
    return computation([positions, frequencies, out])


def _within_a_turn(angle: Any) -> Any:
    # GPUs promise sines within half a turn of 0 only.
    turns = tirx.floor(angle * constant(1 / _TURN) + constant(0.5))
    return angle - turns * constant(_TURN_HIGH) - turns * constant(_TURN_LOW)
