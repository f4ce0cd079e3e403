"""Turns a plan into the arrays of a step. Knows where tokens lie in pages, not who asked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.scheduler import Work
from mlc_llm.engine.sequence import Sequence
from mlc_llm.runtime.runner import Step


class StepBuilder:
    """Keeps a page table with a row for each running sequence, so that a step writes only news."""

    def __init__(self, max_num_sequence: int, max_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._table = np.zeros((max_num_sequence, max_pages), np.int32)
        self._free_rows = list(range(max_num_sequence - 1, -1, -1))
        self._row_of: dict[Sequence, int] = {}
        self._num_written: dict[Sequence, int] = {}

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that no longer runs; unknown ones are fine."""
        row = self._row_of.pop(sequence, None)
        if row is not None:
            self._free_rows.append(row)
            del self._num_written[sequence]

    def build(self, works: list[Work]) -> Step:
        """Return the step of a plan's works, sequence after sequence."""
        if all(work.count == 1 for work in works):
            return self._build_decodes(works)
        size = self._page_size
        rows = [self._write_pages(work.sequence) for work in works]
        tokens: list[int] = []
        logit_rows: list[int] = []
        positions, slots = [], []
        for work, row in zip(works, rows, strict=True):
            first = work.sequence.num_computed
            end = first + work.count
            tokens += work.sequence.tokens[first:end]
            logit_rows.extend(range(len(tokens) - work.num_rows, len(tokens)))
            places = np.arange(first, end, dtype=np.int32)
            positions.append(places)
            slots.append(self._table[row, places // size] * size + places % size)
        counts = [work.count for work in works]
        return Step(
            token_ids=np.asarray(tokens, np.int32),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            query_start=np.cumsum([0, *counts], dtype=np.int32),
            page_table=self._pages_of(works, rows),
            context_len=np.asarray([w.sequence.num_computed + w.count for w in works], np.int32),
            # Compiled code wants at least one row.
            logit_rows=np.asarray(logit_rows or [len(tokens) - 1], np.int32),
            state_slots=_state_slots(works),
        )

    def _build_decodes(self, works: list[Work]) -> Step:
        """Return the step of works of one token each, as views of one array: that is fastest."""
        size, count = self._page_size, len(works)
        rows, tokens, places, slots, logit_rows = [], [], [], [], []
        for index, work in enumerate(works):
            sequence = work.sequence
            place = sequence.num_computed
            rows.append(self._write_pages(sequence))
            tokens.append(sequence.tokens[place])
            places.append(place)
            slots.append(sequence.pages[place // size] * size + place % size)
            if work.num_rows:
                logit_rows.append(index)
        lengths = [place + 1 for place in places]
        values = [*tokens, *places, *slots, *range(count + 1), *lengths, *(logit_rows or [0])]
        array = np.asarray(values, np.int32)
        return Step(
            token_ids=array[:count],
            positions=array[count : 2 * count],
            slots=array[2 * count : 3 * count],
            query_start=array[3 * count : 4 * count + 1],
            page_table=self._pages_of(works, rows),
            context_len=array[4 * count + 1 : 5 * count + 1],
            logit_rows=array[5 * count + 1 :],
            state_slots=_state_slots(works),
        )

    def _write_pages(self, sequence: Sequence) -> int:
        """Bring the row of a sequence up to date and return its number."""
        row = self._row_of.get(sequence)
        if row is None:
            row = self._row_of[sequence] = self._free_rows.pop()
            self._num_written[sequence] = 0
        # The last page may have been replaced by a copy since.
        pages = sequence.pages
        first = max(self._num_written[sequence] - 1, 0)
        if first + 1 == len(pages):
            self._table[row, first] = pages[first]
            return row
        self._table[row, first : len(pages)] = pages[first:]
        self._num_written[sequence] = len(pages)
        return row

    def _pages_of(self, works: list[Work], rows: list[int]) -> NDArray[np.int32]:
        """Return the page table (b, p) of the works; rows are padded with any page."""
        longest = max([len(work.sequence.pages) for work in works])
        first, end = rows[0], rows[0] + len(rows)
        # Neighbours need no copy.
        picked = slice(first, end) if rows == list(range(first, end)) else rows
        table: NDArray[np.int32] = self._table[picked, :longest]
        return table


def _state_slots(works: list[Work]) -> NDArray[np.int32] | None:
    """Return the slots (b) of the works' recurrent states, None for models without."""
    if works[0].sequence.state_slot is None:
        return None
    return np.asarray([work.sequence.state_slot for work in works], np.int32)
