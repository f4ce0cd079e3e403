"""A model runner without a model: its logits are a pure function of the sequence.

It keeps nothing but token ids in its pages, so a wrong slot, page or length changes what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import KVCacheLayout, LibraryMetadata, TensorSpec
from mlc_llm.runtime.runner import SampleRows, Step

Logits = NDArray[np.float32]
VOCAB_SIZE = 512
PAGE_SIZE = 16
HIDDEN_SIZE = 8
# Of libraries for recurrent and hybrid models, and the KV cache of those that have none.
STATES = [TensorSpec("state", (1,), "float32")]
NO_KV = KVCacheLayout(0, 1, 2, PAGE_SIZE, "float16")


def make_metadata(**changes: Any) -> LibraryMetadata:
    """Return the metadata of a small llama library, with some fields replaced."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "quantization": "q4f16_1",
        "context_window_size": 64,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": 8,
        "max_batch_size": 4,
        "vocab_size": VOCAB_SIZE,
        "params": [],
        "kv_cache": KVCacheLayout(1, 1, 2, PAGE_SIZE, "float16"),
        "memory_usage": {"forward": 0, "pack_params": 0},
        "target": {"kind": "llvm"},
        "isa": ["x86_64", "x86-64"],
        "compiler_version": "0",
    }
    return LibraryMetadata(**{**values, **changes})


def next_token(tokens: Sequence[int]) -> int:
    """Return the token that the default runner finds likeliest after `tokens`; never below 3."""
    mixed = 7
    for token in tokens:
        mixed = (mixed * 31 + token + 1) % 1_000_003
    return 3 + mixed % (VOCAB_SIZE - 3)


def continuation(prompt: list[int], count: int = 8) -> list[int]:
    """Return what the fake runner says after a prompt, from its definition."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def only(token: int, vocab_size: int = VOCAB_SIZE) -> Logits:
    """Return logits by which nothing but `token` is likely."""
    logits = np.zeros(vocab_size, np.float32)
    logits[token] = 50
    return logits


class FakeRunner:
    """Answers by `logits_of`, a function of a sequence's tokens; records every step.

    `error`, where it is set, is raised by the next step, after the step has been recorded. With
    `states` in its metadata it reads the tokens from slots of state, and from pages to compare.
    """

    def __init__(
        self,
        logits_of: Callable[[list[int]], Logits] = lambda tokens: only(next_token(tokens)),
        num_pages: int | None = None,
        num_state_slots: int = 0,
        **changes: Any,
    ) -> None:
        self.metadata = make_metadata(**changes)
        self.num_state_slots = num_state_slots
        self._states: list[list[int]] = [[] for _ in range(num_state_slots)]
        context = self.metadata.context_window_size
        self.num_pages = num_pages or -(-context // PAGE_SIZE)
        self.logits_of = logits_of
        self.steps: list[Step] = []
        self.error: BaseException | None = None
        self.is_closed = False
        self._tokens = np.full(self.num_pages * PAGE_SIZE, -1, np.int64)

    @property
    def step_sizes(self) -> list[int]:
        """Return the number of tokens of each step."""
        return [len(step.token_ids) for step in self.steps]

    def forward(self, step: Step) -> Logits:
        """Store the step's tokens in their slots, then read each sequence from its pages."""
        self.steps.append(step)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self._check(step)
        self._tokens[step.slots] = step.token_ids
        if self.metadata.states:
            self._advance_states(step)
        return np.stack([self.logits_of(self._sequence_of(step, int(r))) for r in step.logit_rows])

    def sample(self, logits: Logits, rows: SampleRows) -> NDArray[np.int32]:
        """Sample by sorting, the plain way."""
        return np.asarray([_draw(row, rows, i) for i, row in enumerate(logits)], np.int32)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the tokens of pages."""
        pages = self._tokens.reshape(self.num_pages, PAGE_SIZE)
        pages[list(targets)] = pages[list(sources)]

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the tokens of states, one after the other."""
        for source, target in zip(sources, targets, strict=True):
            self._states[target] = list(self._states[source])

    def close(self) -> None:
        """Remember that it was closed."""
        self.is_closed = True

    def _sequence_of(self, step: Step, row: int) -> list[int]:
        """Return the tokens that the token at `row` of the step sees, itself included."""
        owner = int(np.searchsorted(step.query_start, row, side="right")) - 1
        if self.metadata.states and self.metadata.kv_cache.num_layers == 0:
            assert step.state_slots is not None
            return self._states[step.state_slots[owner]][: step.positions[row] + 1]
        places = np.arange(step.positions[row] + 1)
        pages = step.page_table[owner, places // PAGE_SIZE]
        tokens: list[int] = self._tokens[pages * PAGE_SIZE + places % PAGE_SIZE].tolist()
        return tokens

    def _advance_states(self, step: Step) -> None:
        """Append the step's tokens to the states; in hybrid models pages must say the same."""
        assert step.state_slots is not None
        assert len(set(step.state_slots.tolist())) == len(step.context_len)
        for owner, slot in enumerate(step.state_slots):
            first, end = step.query_start[owner], step.query_start[owner + 1]
            history = [] if step.positions[first] == 0 else self._states[slot]
            assert len(history) == step.positions[first], "the state is of another length"
            self._states[slot] = [*history, *step.token_ids[first:end].tolist()]
            if self.metadata.kv_cache.num_layers > 0:
                assert self._sequence_of(step, int(end) - 1) == self._states[slot]

    def _check(self, step: Step) -> None:
        n, batch = len(step.token_ids), len(step.context_len)
        assert n <= max(self.metadata.prefill_chunk_size, self.metadata.max_batch_size)
        assert step.positions.shape == step.slots.shape == (n,)
        assert step.query_start.shape == (batch + 1,) and step.query_start[-1] == n
        assert (step.state_slots is None) == (not self.metadata.states)
        for array in vars(step).values():
            assert array is None or array.dtype == np.int32
        for owner in range(batch):
            first, end = step.query_start[owner], step.query_start[owner + 1]
            context = int(step.context_len[owner])
            assert context <= self.metadata.context_window_size
            positions = np.arange(context - (end - first), context)
            assert step.positions[first:end].tolist() == positions.tolist()
            pages = step.page_table[owner, positions // PAGE_SIZE]
            slots = pages * PAGE_SIZE + positions % PAGE_SIZE
            assert step.slots[first:end].tolist() == slots.tolist()


def hidden_state(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return what `FakeEncodingRunner` makes of a sequence: a vector that every token changes."""
    state = np.zeros(HIDDEN_SIZE)
    for token in tokens:
        state = np.sin(state * 3 + token + np.arange(HIDDEN_SIZE))
    return state.astype(np.float32)


class FakeEncodingRunner(FakeRunner):
    """Like `FakeRunner`, for embeddings: the state of a token is a function of its sequence."""

    def __init__(self, num_pages: int | None = None, **changes: Any) -> None:
        super().__init__(num_pages=num_pages, model_task="embedding", **changes)
        self.logits_of = hidden_state

    def encode(self, step: Step) -> NDArray[np.float32]:
        """Store the step's tokens in their slots; return the states of the wanted rows."""
        return self.forward(step)


def _draw(logits: Logits, rows: SampleRows, row: int) -> int:
    if rows.temperature[row] < 1e-5:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / rows.temperature[row])
    order = np.argsort(-weights, kind="stable")
    if rows.top_k[row] > 0:
        order = order[: rows.top_k[row]]
    sums = np.cumsum(weights[order])
    kept = order[: int(np.searchsorted(sums, rows.top_p[row] * sums[-1])) + 1]
    kept = kept[weights[kept] >= rows.min_p[row]]
    chosen = np.zeros(len(weights))
    chosen[kept] = weights[kept]
    sums = np.cumsum(chosen)
    return int(np.searchsorted(sums, rows.uniform[row] * sums[-1], side="right"))
