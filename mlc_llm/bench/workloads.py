"""What a benchmark runs: its steps, the pages they need, and whether a library allows them.

Knows steps and limits of libraries; does not know clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlc_llm.artifact import LibraryMetadata
from mlc_llm.errors import OptionError
from mlc_llm.runtime.runner import Step


@dataclass(frozen=True)
class Workload:
    """One thing to measure: `batch` sequences get `tokens` tokens each, after `context` tokens.

    A prefill brings them in chunks as long as the library takes, a decode one by one.
    """

    name: Literal["prefill", "decode"]
    tokens: int
    batch: int = 1
    context: int = 0

    def __str__(self) -> str:
        if self.name == "prefill":
            return f"prefill {self.tokens:,}"
        return f"decode {self.tokens:,}, batch {self.batch}, context {self.context:,}"

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.tokens * self.batch

    def pages_per_sequence(self, page_size: int) -> int:
        """Return how many KV pages one sequence fills."""
        return -(-(self.context + self.tokens) // page_size)


def plan_workloads(
    prefill: Sequence[int], decode: int, batch: Sequence[int], context: Sequence[int]
) -> list[Workload]:
    """Return a prefill of each length, and a decode of each batch at each context; 0 is none.

    Raises OptionError where nothing is left.
    """
    workloads = [Workload("prefill", tokens) for tokens in prefill if tokens > 0]
    if decode > 0:
        workloads += [Workload("decode", decode, b, c) for c in context for b in batch]
    if not workloads:
        raise OptionError("--prefill 0 and --decode 0 leave nothing to measure; raise one of them")
    return workloads


def check_workloads(
    workloads: Sequence[Workload], metadata: LibraryMetadata, memory_bytes: int | None
) -> None:
    """Raise OptionError for what the library was not compiled for or memory cannot hold.

    memory_bytes: what the machine has, None where that is not known.
    """
    window, most = metadata.context_window_size, metadata.max_batch_size
    for workload in workloads:
        wanted = workload.context + workload.tokens
        if wanted > window:
            raise OptionError(
                f"{workload}: {wanted:,} tokens do not fit the context window of {window:,}; "
                f"use fewer, or --overrides context_window_size={wanted} if the model can do that"
            )
        if workload.batch > most:
            raise OptionError(
                f"{workload}: the library takes at most {most} sequences at once; use fewer, or "
                f"--overrides max_batch_size={workload.batch}"
            )
        kv_bytes = workload.batch * wanted * metadata.kv_cache.bytes_per_token
        if memory_bytes is not None and kv_bytes > memory_bytes:
            raise OptionError(
                f"{workload}: its KV cache takes {kv_bytes / 1e9:.1f} GB, this machine has "
                f"{memory_bytes / 1e9:.1f} GB of memory; use a smaller batch or context"
            )


def num_pages_of(workloads: Sequence[Workload], page_size: int) -> int:
    """Return how many KV pages the largest workload fills."""
    return max(w.batch * w.pages_per_sequence(page_size) for w in workloads)


def num_state_slots_of(workloads: Sequence[Workload]) -> int:
    """Return how many slots of recurrent state the largest batch takes."""
    return max(w.batch for w in workloads)


def make_steps(workload: Workload, metadata: LibraryMetadata, seed: int) -> list[Step]:
    """Return the steps of a workload with random tokens; each sequence has pages of its own.

    What the context's pages hold is left to the runner: it does not change the work.
    """
    random = np.random.default_rng(seed)
    shape = (workload.batch, workload.tokens)
    tokens = random.integers(0, metadata.vocab_size, shape, dtype=np.int32)
    size = metadata.prefill_chunk_size if workload.name == "prefill" else 1
    end = workload.context + workload.tokens
    starts = range(workload.context, end, size)
    return [
        _make_step(workload, metadata, tokens, start, min(start + size, end)) for start in starts
    ]


def _make_step(
    workload: Workload,
    metadata: LibraryMetadata,
    tokens: np.ndarray[tuple[int, int], np.dtype[np.int32]],
    start: int,
    end: int,
) -> Step:
    """Return the step that brings positions `start` to `end` of every sequence."""
    page_size, batch = metadata.kv_cache.page_size, workload.batch
    per_sequence = workload.pages_per_sequence(page_size)
    first_pages = np.arange(batch, dtype=np.int32)[:, None] * per_sequence  # (b, 1)
    positions = np.arange(start, end, dtype=np.int32)[None]  # (1, n / b)
    slots = first_pages * page_size + positions  # pages of a sequence are in order
    in_use = np.arange(-(-end // page_size), dtype=np.int32)[None]
    query_start = np.arange(batch + 1, dtype=np.int32) * (end - start)
    return Step(
        token_ids=tokens[:, start - workload.context : end - workload.context].flatten(),
        positions=np.broadcast_to(positions, slots.shape).flatten(),
        slots=slots.flatten(),
        query_start=query_start,
        page_table=first_pages + in_use,
        context_len=np.full(batch, end, np.int32),
        logit_rows=query_start[1:] - 1,
        state_slots=np.arange(batch, dtype=np.int32) if metadata.states else None,
    )
