"""Hidden states of whole texts, pooled: many inputs share a step, long ones may take several.

Knows steps, pages and which tokens of an input its vector is made of. Does not know text or
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import LibraryMetadata
from mlc_llm.errors import UnsupportedModel
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.runner import EncodingRunner, Step

# Which token states become the vector of an input: its first, its last, or the mean of all.
Pooling = Literal["cls", "mean", "last"]


@dataclass(frozen=True)
class _Part:
    """Tokens first .. end of one input, which a step computes."""

    index: int
    first: int
    end: int
    is_last: bool

    def pooled_rows(self, pooling: Pooling) -> range:
        """Return the tokens of the part, counted from its first, whose states are wanted."""
        num_tokens = self.end - self.first
        if pooling == "mean":
            return range(num_tokens)
        if pooling == "cls":
            return range(1 if self.first == 0 else 0)
        return range(num_tokens - 1 if self.is_last else num_tokens, num_tokens)


def read_pooling(name: str) -> Pooling:
    """Return a way of pooling by its name in `embedding_metadata`. Raises UnsupportedModel."""
    if name not in get_args(Pooling):
        raise UnsupportedModel(
            f"the model pools its tokens by {name!r:.80}; this release pools by "
            f"{', '.join(get_args(Pooling))}"
        )
    return cast("Pooling", name)


def pages_for_encoding(metadata: LibraryMetadata) -> int:
    """Return how many pages no request can exceed.

    At most one input is continued from an earlier step; all others lie in one step.
    """
    size = metadata.kv_cache.page_size
    chunk = metadata.prefill_chunk_size
    continued = -(-metadata.context_window_size // size)
    return continued + -(-chunk // size) + min(chunk, metadata.max_batch_size)


class Encoder:
    """Encodes inputs with a runner that it owns; one call at a time."""

    def __init__(
        self, runner: EncodingRunner, *, pooling: Pooling = "last", is_causal: bool = True
    ) -> None:
        """Take a runner. Inputs of a model that is not causal are never cut between steps."""
        metadata = runner.metadata
        self.max_input_len = metadata.context_window_size
        if not is_causal:
            self.max_input_len = min(self.max_input_len, metadata.prefill_chunk_size)
        self.vocab_size = metadata.vocab_size
        self._runner = runner
        self.pooling: Pooling = pooling
        self._is_causal = is_causal
        self._max_step_tokens = metadata.prefill_chunk_size
        self._max_step_inputs = metadata.max_batch_size
        self._pool = PagePool(runner.num_pages, metadata.kv_cache.page_size)

    def encode(
        self, inputs: Sequence[Sequence[int]], before_step: Callable[[], None] = lambda: None
    ) -> NDArray[np.float32]:
        """Return the pooled hidden states of each input: (len(inputs), hidden) float32.

        inputs: token ids, at least one each and at most `max_input_len`. What `before_step` raises
        ends the call.
        """
        sums: list[NDArray[np.float64]] = []  # of the wanted states of inputs 0, 1, ...
        pages: dict[int, list[int]] = {}  # of the inputs under way
        try:
            for parts in self._cut(inputs):
                before_step()
                rows = self._runner.encode(self._build(inputs, parts, pages))
                first = 0
                for part in parts:
                    count = len(part.pooled_rows(self.pooling))
                    _add_rows(sums, part.index, rows[first : first + count])
                    first += count
                    if part.is_last:
                        self._pool.give_back(pages.pop(part.index))
        finally:
            for held in pages.values():
                self._pool.give_back(held)
        pooled = np.stack(sums)
        if self.pooling == "mean":
            pooled /= np.asarray([[len(tokens)] for tokens in inputs])
        return pooled.astype(np.float32)

    def close(self) -> None:
        """Free the model's memory."""
        self._runner.close()

    def check_integrity(self) -> None:
        """Assert that all pages are free, as they are between calls."""
        self._pool.check_integrity([])

    def _cut(self, inputs: Sequence[Sequence[int]]) -> Iterator[list[_Part]]:
        """Yield the parts of each step: inputs in order, cut where a step is full."""
        parts: list[_Part] = []
        room = self._max_step_tokens
        for index, tokens in enumerate(inputs):
            if not self._is_causal and room < len(tokens):
                yield parts
                parts, room = [], self._max_step_tokens
            first = 0
            while first < len(tokens):
                end = min(len(tokens), first + room)
                parts.append(_Part(index, first, end, end == len(tokens)))
                room -= end - first
                first = end
                if room == 0 or len(parts) == self._max_step_inputs:
                    yield parts
                    parts, room = [], self._max_step_tokens
        if parts:
            yield parts

    def _build(
        self, inputs: Sequence[Sequence[int]], parts: list[_Part], pages: dict[int, list[int]]
    ) -> Step:
        """Return the step of some parts; their inputs take the pages they lack."""
        size = self._pool.page_size
        tokens: list[int] = []
        wanted: list[int] = []
        positions, slots = [], []
        for part in parts:
            held = pages.setdefault(part.index, [])
            held.extend(self._pool.take(-(-part.end // size) - len(held)))
            wanted += [len(tokens) + row for row in part.pooled_rows(self.pooling)]
            tokens += inputs[part.index][part.first : part.end]
            places = np.arange(part.first, part.end, dtype=np.int32)
            positions.append(places)
            slots.append(np.asarray(held, np.int32)[places // size] * size + places % size)
        longest = max(len(pages[part.index]) for part in parts)
        table = np.zeros((len(parts), longest), np.int32)
        for row, part in enumerate(parts):
            table[row, : len(pages[part.index])] = pages[part.index]
        ends = np.cumsum([part.end - part.first for part in parts], dtype=np.int32)
        return Step(
            token_ids=np.asarray(tokens, np.int32),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots).astype(np.int32),
            query_start=np.concatenate([np.zeros(1, np.int32), ends]),
            page_table=table,
            context_len=np.asarray([part.end for part in parts], np.int32),
            # Compiled code wants at least one row.
            logit_rows=np.asarray(wanted or [len(tokens) - 1], np.int32),
        )


def _add_rows(sums: list[NDArray[np.float64]], index: int, rows: NDArray[np.float32]) -> None:
    """Add rows (n, hidden) to the sum of input `index`, one after the other.

    So the sum does not depend, to the bit, on how the input was cut into steps.
    """
    if index == len(sums):
        sums.append(np.zeros(rows.shape[1], np.float64))
    for row in rows:
        sums[index] += row
