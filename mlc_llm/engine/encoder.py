"""Hidden states of whole texts: many inputs share a step, long ones take several.

Knows steps and pages. Does not know text, pooling beyond the last token, or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import LibraryMetadata
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.runner import EncodingRunner, Step


@dataclass(frozen=True)
class _Part:
    """Tokens first .. end of one input, which a step computes."""

    index: int
    first: int
    end: int
    is_last: bool


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

    def __init__(self, runner: EncodingRunner) -> None:
        metadata = runner.metadata
        self.max_input_len = metadata.context_window_size
        self.vocab_size = metadata.vocab_size
        self._runner = runner
        self._max_step_tokens = metadata.prefill_chunk_size
        self._max_step_inputs = metadata.max_batch_size
        self._pool = PagePool(runner.num_pages, metadata.kv_cache.page_size)

    def encode(
        self, inputs: Sequence[Sequence[int]], before_step: Callable[[], None] = lambda: None
    ) -> NDArray[np.float32]:
        """Return the hidden state of each input's last token: (len(inputs), hidden) float32.

        inputs: token ids, at least one each and at most `max_input_len`. What `before_step` raises
        ends the call.
        """
        states: list[NDArray[np.float32]] = []
        pages: dict[int, list[int]] = {}  # of the inputs under way
        try:
            for parts in self._cut(inputs):
                before_step()
                rows = self._runner.encode(self._build(inputs, parts, pages))
                ended = [part.index for part in parts if part.is_last]
                states.extend(rows[: len(ended)].copy())
                for index in ended:
                    self._pool.give_back(pages.pop(index))
        finally:
            for held in pages.values():
                self._pool.give_back(held)
        return np.stack(states)

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
        positions, slots = [], []
        for part in parts:
            held = pages.setdefault(part.index, [])
            held.extend(self._pool.take(-(-part.end // size) - len(held)))
            tokens += inputs[part.index][part.first : part.end]
            places = np.arange(part.first, part.end, dtype=np.int32)
            positions.append(places)
            slots.append(np.asarray(held, np.int32)[places // size] * size + places % size)
        longest = max(len(pages[part.index]) for part in parts)
        table = np.zeros((len(parts), longest), np.int32)
        for row, part in enumerate(parts):
            table[row, : len(pages[part.index])] = pages[part.index]
        ends = np.cumsum([part.end - part.first for part in parts], dtype=np.int32)
        # Compiled code wants at least one row.
        last = [end - 1 for part, end in zip(parts, ends, strict=True) if part.is_last]
        return Step(
            token_ids=np.asarray(tokens, np.int32),
            positions=np.concatenate(positions),
            slots=np.concatenate(slots).astype(np.int32),
            query_start=np.concatenate([np.zeros(1, np.int32), ends]),
            page_table=table,
            context_len=np.asarray([part.end for part in parts], np.int32),
            logit_rows=np.asarray(last or [len(tokens) - 1], np.int32),
        )
