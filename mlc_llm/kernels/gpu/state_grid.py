"""How a block of threads holds a part of a head's state, a matrix, in registers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

_ROWS = 32  # of a column, that a thread has, if they can be dealt
_COLUMNS = 32
_THREADS = 256  # at most; every GPU has so many


@dataclass(frozen=True)
class StateGrid:
    """The layout for states (rows, columns): `row_step` rows of a column for each thread.

    `deep` threads share a column, and a block has `across` columns.
    """

    rows: int
    columns: int

    @property
    def row_step(self) -> int:
        """Return the rows of a thread: they are dealt evenly."""
        return next(n for n in range(min(_ROWS, self.rows), self.rows + 1) if self.rows % n == 0)

    @property
    def lanes(self) -> int:
        """Return how many of its rows a thread reads at once from rows of tokens."""
        return math.gcd(self.row_step, 4)

    @property
    def deep(self) -> int:
        """Return the threads of a column."""
        return self.rows // self.row_step

    @property
    def across(self) -> int:
        """Return the columns of a block."""
        return min(_COLUMNS, self.columns, max(_THREADS // self.deep, 1))

    @property
    def tiles(self) -> int:
        """Return the blocks of a state; the last one may have columns of no use."""
        return -(-self.columns // self.across)

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return self.deep * self.across


@T.macro
def load_items(
    rows: T.handle, items: T.handle, row: T.int32, first: T.int32, count: T.meta_var, lanes: Any
) -> None:
    """Take `count` items of a row into registers, `lanes` at once."""
    for j in T.unroll(count // lanes):
        for v in T.vectorized(lanes):
            items[j * lanes + v] = rows[row, first + j * lanes + v]


@T.macro
def load_state(
    state: T.handle,
    held: T.handle,
    slot: T.int32,
    head: T.int32,
    first_row: T.int32,
    column: T.int32,
    row_step: T.meta_var,
    is_new: Any,
) -> None:
    """Take a thread's rows of a column into registers, zeros for a new sequence."""
    if is_new:
        for j in T.unroll(row_step):
            held[j] = T.float32(0)
    else:
        for j in T.unroll(row_step):
            held[j] = state[slot, head, first_row + j, column]


@T.macro
def store_state(
    state: T.handle,
    held: T.handle,
    slot: T.int32,
    head: T.int32,
    first_row: T.int32,
    column: T.int32,
    row_step: T.meta_var,
) -> None:
    """Put a thread's rows of a column back."""
    for j in T.unroll(row_step):
        state[slot, head, first_row + j, column] = held[j]
