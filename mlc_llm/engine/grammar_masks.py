"""Holds a sequence to its grammar: which tokens may come next, and which must.

Masks are computed by a few threads while the model's step runs. Knows tokens and logits; does not
know steps, nor how grammars are written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.grammar_cache import CompiledGrammar
from mlc_llm.engine.thinking import ThoughtCounter
from mlc_llm.errors import RequestError

if TYPE_CHECKING:
    from mlc_llm.engine.scheduler import Work

_NUM_THREADS = 2
# A mask is a list of ids where at most one of so many tokens is in it.
_SPARSE = 32
# No logit is as large.
_ANY_LOGIT = np.float32(3e38)


class SequenceGrammar:
    """Where one sequence is in its grammar.

    Before the text that the grammar starts after, everything is allowed but an end. `forced` are
    tokens that must come next; they have been decided already, whoever appends them. They come
    from the grammar, or end thoughts of which there were enough.
    """

    def __init__(
        self,
        compiled: CompiledGrammar,
        stop_token_ids: Iterable[int],
        forbidden_logit: np.float32,
    ) -> None:
        """stop_token_ids may be chosen where the grammar allows an end or names them itself."""
        vocabulary = compiled.vocabulary
        self.forced: deque[int] = deque()
        self._matcher = None if compiled.matcher is None else compiled.matcher.deep_copy()
        self._vocabulary = vocabulary
        self._stop_ids = np.asarray(
            sorted(token for token in stop_token_ids if 0 <= token < vocabulary.end_id), np.int64
        )
        self._forbidden_logit = forbidden_logit
        self._starts_after = compiled.starts_after
        self._is_waiting = bool(compiled.starts_after)
        self._tail = b""
        self._error: str | None = None
        self._words = np.zeros(-(-vocabulary.size // 32), np.uint32)
        self._words_memory = (self._words.ctypes.data, self._words.nbytes)
        # Special tokens are in a mask only where the grammar names them.
        self._text_stops = [
            (int(token) >> 5, ~np.uint32(1 << (int(token) & 31)))
            for token in self._stop_ids
            if not vocabulary.is_special(int(token))
        ]
        self._mask: _Mask | None = None  # None: to be computed
        self._last_mask: _Mask | None = None
        self._last_words = self._words[:0]
        self._computing: _Job | None = None
        self._thoughts: ThoughtCounter | None = None
        if compiled.thoughts is not None:
            self._thoughts = ThoughtCounter(compiled.thoughts, vocabulary)
            self._end_thoughts(self._thoughts)

    @property
    def is_finished(self) -> bool:
        """Return whether the text is complete and nothing may follow."""
        if self._is_waiting or self.forced or self._matcher is None:
            return False
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def needs_mask(self) -> bool:
        """Return whether a mask is to be computed before the next token can be chosen."""
        is_free = self._is_waiting or self._matcher is None
        return self._mask is None and not is_free and not self.forced

    def note_computing(self, computing: _Job) -> None:
        """Take note of who computes the next mask."""
        self._computing = computing

    def compute_mask(self) -> None:
        """Find out which tokens may come next; takes no lock of Python's for the most of it."""
        if not self.needs_mask or self._matcher is None:
            return
        self._matcher.unsafe_compute_mask_ptr(*self._words_memory)
        if self._matcher.is_error():
            self._error = self._matcher.get_error()
            return
        end_id = self._vocabulary.end_id
        word, end_bit = int(self._words[end_id >> 5]), 1 << (end_id & 31)
        may_end = word & end_bit != 0
        if may_end:
            self._words[end_id >> 5] = word & ~end_bit
        for word, kept in self._text_stops:
            self._words[word] &= kept
        # Inside of a text one place is mostly like the one before.
        last = self._last_mask
        if last is None or last.may_end != may_end or not _equal(self._words, self._last_words):
            last = _Mask.of(self._words, end_id, may_end, self._forbidden_logit)
            self._last_mask, self._last_words = last, self._words.copy()
        self._mask = last

    def restrict(self, logits: NDArray[np.float32], may_stop: bool) -> bool:
        """Forbid tokens in a row of logits (v); return False where the text must end here.

        may_stop: whether the request allows an end yet, where there is a choice. Raises
        RequestError where the grammar has become too much.
        """
        if self.forced:
            token = self.forced[0]
            kept = logits[token]
            logits[:] = self._forbidden_logit
            logits[token] = kept
            return True
        if self._thoughts is not None and (barred := self._thoughts.barred) is not None:
            logits[barred] = self._forbidden_logit
        if self._is_waiting:
            logits[self._stop_ids] = self._forbidden_logit
        if self._is_waiting or self._matcher is None:
            return True
        if self._computing is not None:
            self._computing.wait()
            self._computing = None
        self.compute_mask()
        self._check()
        mask = self._mask
        assert mask is not None
        if not mask.may_go_on:
            if not mask.may_end:
                raise RequestError(
                    "the grammar came to a place where no token of this model fits",
                    "response_format",
                )
            return False
        stops = logits[self._stop_ids] if mask.may_end and may_stop else None
        mask.apply(logits[: self._vocabulary.end_id], self._forbidden_logit)
        if stops is not None:
            logits[self._stop_ids] = stops
        return True

    def append(self, token_id: int) -> None:
        """Take note of a token of the text, and find what must follow."""
        if self.forced:
            expected = self.forced.popleft()
            assert token_id == expected, "a forced token was not chosen"
            return
        self._take([token_id])
        if self._thoughts is not None:
            self._end_thoughts(self._thoughts)

    def _take(self, token_ids: list[int]) -> None:
        """Go on by tokens that come now or must come next, and by what the grammar forces then."""
        matched = token_ids
        while self._is_waiting and matched:
            self._wait(matched[0])
            matched = matched[1:]
        forced: list[int] = []
        if self._matcher is not None and matched:
            self._mask = None
            if not self._matcher.consume_tokens(matched):
                self._error = self._matcher.get_error()
                return
            forced = self._matcher.compute_ff_tokens()
            if forced and self._matcher.consume_tokens(forced):
                self.forced.extend(forced)
        if self._thoughts is not None:
            for token in (*token_ids, *forced):
                self._thoughts.append(token)
            if self._thoughts.is_over:
                self._thoughts = None

    def _end_thoughts(self, thoughts: ThoughtCounter) -> None:
        """Force the end of thoughts of which there were enough, where it may come."""
        if not thoughts.must_end or self.forced:
            return
        closing = list(thoughts.limit.closing)
        if self._matcher is not None and not self._is_waiting:
            if self._matcher.validate_tokens(closing) < len(closing):
                return  # inside of a character, which the next tokens complete
        self.forced.extend(closing)
        self._take(closing)

    def _wait(self, token_id: int) -> None:
        """Look whether the text that the grammar starts after has come."""
        self._tail += self._vocabulary.bytes_of(token_id)
        if any(text in self._tail for text in self._starts_after):
            self._is_waiting = False
        self._tail = self._tail[-max(map(len, self._starts_after)) :]

    def _check(self) -> None:
        if self._error is not None:
            reason = self._error.splitlines()[0][:200] if self._error else "unknown"
            raise RequestError(
                "the answer cannot go on: the grammar takes too much work at this place, or wants "
                f"a character that the model does not know ({reason}); make it simpler",
                "response_format",
            )


@dataclass(frozen=True)
class _Mask:
    """Which tokens may come next, in the form that is quickest to apply.

    only: the ids that may come, where they are few. never: those that may not, where those are few.
    Else limits: the largest logit of each token. may_end: the text may end here. may_go_on: some
    token may come.
    """

    may_end: bool
    may_go_on: bool
    only: NDArray[np.int64] | None = None
    never: NDArray[np.int64] | None = None
    limits: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls, words: NDArray[np.uint32], end_id: int, may_end: bool, forbidden: np.float32
    ) -> _Mask:
        """Read a mask of a bit for each token below `end_id`; the bits behind them are 0."""
        most = end_id // _SPARSE
        ids = _few_ids(words, most)
        if ids is not None:
            return cls(may_end, len(ids) > 0, only=ids)
        ids = _few_ids(~words, most)
        if ids is not None:
            return cls(may_end, True, never=ids[: np.searchsorted(ids, end_id)])
        bits = np.unpackbits(words.view(np.uint8), count=end_id, bitorder="little")
        limits = bits.astype(np.float32)
        limits *= _ANY_LOGIT
        limits += forbidden
        return cls(may_end, True, limits=limits)

    def apply(self, logits: NDArray[np.float32], forbidden: np.float32) -> None:
        """Forbid what may not come in a row of logits (v)."""
        if self.only is not None:
            kept = logits[self.only]
            logits.fill(forbidden)
            logits[self.only] = kept
        elif self.never is not None:
            logits[self.never] = forbidden
        elif self.limits is not None:
            np.minimum(logits, self.limits, out=logits)


def _equal(words: NDArray[np.uint32], others: NDArray[np.uint32]) -> bool:
    return len(words) == len(others) and bool((words == others).all())


def _few_ids(words: NDArray[np.uint32], most: int) -> NDArray[np.int64] | None:
    """Return which bits are set, in order; None if there are more than `most`, or nearly."""
    places = np.flatnonzero(words != 0)
    if 2 * len(places) > len(words):
        return None
    bits = np.unpackbits(words[places].view(np.uint8), bitorder="little").view(np.bool_)
    if np.count_nonzero(bits) > most:
        return None
    found = np.flatnonzero(bits)
    ids: NDArray[np.int64] = (places[found >> 5] << 5) + (found & 31)
    return ids


class MaskThreads:
    """The threads that compute masks; they start with the first mask."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, works: Iterable[Work]) -> None:
        """Compute the masks that the next tokens of a step need, while the caller runs it."""
        missing = [grammar for grammar in _chosen_by(works) if grammar.needs_mask]
        if not missing:
            return
        for first in range(min(_NUM_THREADS, len(missing))):
            job = _Job(missing[first::_NUM_THREADS])
            for grammar in job.grammars:
                grammar.note_computing(job)
            if first == len(self._threads):
                thread = threading.Thread(
                    target=_run, args=(self._jobs,), name="mlc_llm masks", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._jobs.put(job)

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _chosen_by(works: Iterable[Work]) -> Iterator[SequenceGrammar]:
    """Yield the grammars of the sequences whose next token a step's logits choose."""
    for work in works:
        if work.count == work.sequence.num_left:
            for sequence in (work.sequence, *work.sequence.state.forks):
                if sequence.sampler.grammar is not None:
                    yield sequence.sampler.grammar


class _Job:
    """Masks that one thread computes; a step has few, so they cost little to hand over."""

    def __init__(self, grammars: list[SequenceGrammar]) -> None:
        self.grammars = grammars
        self._error: BaseException | None = None
        self._is_running = threading.Lock()
        self._is_running.acquire()

    def run(self) -> None:
        """Compute the masks; a failure is that of whoever waits."""
        try:
            for grammar in self.grammars:
                grammar.compute_mask()
        except BaseException as error:
            self._error = error
        finally:
            self._is_running.release()

    def wait(self) -> None:
        """Return when the masks are there. Raises what computing them raised."""
        with self._is_running:
            if self._error is not None:
                raise self._error


def _run(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
