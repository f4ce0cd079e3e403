"""Chooses the next token of each row of a batch; a row's choice depends on its own sequence alone.

Order: logit bias, repetition penalty (Keskar et al. 2019) over prompt and output, presence and
frequency penalties over the output, what is forbidden (by min_tokens or the request's grammar),
temperature; then the library's `sample`:
top-k, min-p, nucleus (Holtzman et al. 2020).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mlc_llm.engine.grammar_cache import CompiledGrammar
from mlc_llm.engine.grammar_masks import SequenceGrammar
from mlc_llm.engine.request import TokenLogprobs
from mlc_llm.engine.sampling import GREEDY_TEMPERATURE, SamplingParams
from mlc_llm.errors import MlcError, RequestError, StepFailed
from mlc_llm.runtime.memory import aligned_zeros
from mlc_llm.runtime.runner import ModelRunner, SampleRows

# The logit of a token that must not be chosen: finite, so that a row may consist of it.
_NEVER = np.float32(-1e30)
# What OpenAI reports for probabilities near zero; JSON has no infinity.
_LOWEST_LOGPROB = -9999.0
# Neighbours of which only the largest is looked at in the search for the likeliest tokens.
_BLOCK = 256


@dataclass(frozen=True)
class Sampled:
    """A row's token; where is_end or error is set there is none, and the row's sequence must end.

    is_end: the text is complete. error: it cannot go on, for a reason that is this row's alone.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    is_end: bool = False
    error: MlcError | None = None


class SequenceSampler:
    """What sampling remembers of one sequence: its draws, and which tokens it has seen how often.

    Sequence `index` of a request draws by itself: the same seed gives the same tokens in any batch.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        index: int,
        stop_token_ids: frozenset[int],
        vocab_size: int,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        """prompt: token ids; stop_token_ids: those that min_tokens and the grammar hold back."""
        self.params = params
        self.is_greedy = (
            params.temperature < GREEDY_TEMPERATURE or params.top_p == 0 or params.top_k == 1
        )
        self._num_generated = 0
        self._key = _draw_key(params.seed, index)
        self._stop_ids = np.asarray(
            sorted(token for token in stop_token_ids if 0 <= token < vocab_size), np.int64
        )
        bias = dict(params.logit_bias)
        self._bias_ids = np.asarray(list(bias), np.int64)
        self._bias = np.asarray(list(bias.values()), np.float32)
        self._penalties = _Penalties(params, prompt) if _has_penalties(params) else None
        self.grammar = None if grammar is None else SequenceGrammar(grammar, stop_token_ids, _NEVER)

    def append(self, token_id: int) -> None:
        """Take note of a token of the output."""
        self._num_generated += 1
        if self._penalties is not None:
            self._penalties.append(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)

    @property
    def adjusts(self) -> bool:
        """Return whether `adjust` would change anything."""
        has_grammar = self.grammar is not None
        return (
            has_grammar or self._penalties is not None or len(self._bias_ids) > 0 or self._forbids
        )

    def adjust(self, logits: NDArray[np.float32]) -> bool:
        """Apply biases and penalties to a row (v) in place, at the ids concerned only.

        Return False where there is no token to choose: the grammar is at its end. Raises
        RequestError where it cannot go on.
        """
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self._penalties is not None:
            self._penalties.apply(logits)
        if self._forbids:  # last, so that no bias lifts what must not be chosen
            logits[self._stop_ids] = np.minimum(logits[self._stop_ids], _NEVER)
        return self.grammar is None or self.grammar.restrict(logits, not self._forbids)

    def draw(self) -> float:
        """Return the number in [0, 1) that decides the next token.

        It is a function of seed, index and place, whatever was asked before.
        """
        place = self._num_generated.to_bytes(8, "little")
        digest = blake2b(place, digest_size=8, key=self._key).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    @property
    def _forbids(self) -> bool:
        return self._num_generated < self.params.min_tokens


class _Penalties:
    """The penalties of one sequence, as arrays over the tokens it has seen.

    They grow by doubling; a token keeps its place in them.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._repetition = np.float32(params.repetition_penalty)
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        seen = dict.fromkeys(prompt) if self._repetition != 1 else {}
        self._place_of = dict(zip(seen, range(len(seen)), strict=True))
        self._ids = np.zeros(2 * len(seen) + 64, np.int64)
        self._ids[: len(seen)] = np.fromiter(seen, np.int64, len(seen))
        self._counts = np.zeros(len(self._ids), np.int64)
        # What is taken from each logit: nothing for tokens that only the prompt has.
        self._offsets = np.zeros(len(self._ids), np.float32)

    def append(self, token_id: int) -> None:
        place = self._place_of.setdefault(token_id, len(self._place_of))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._offsets = np.concatenate([self._offsets, np.zeros_like(self._offsets)])
        self._ids[place] = token_id
        self._counts[place] += 1
        self._offsets[place] = self._presence + self._frequency * self._counts[place]

    def apply(self, logits: NDArray[np.float32]) -> None:
        num_seen = len(self._place_of)
        ids = self._ids[:num_seen]
        picked = logits[ids]
        if self._repetition != 1:
            picked = np.where(picked > 0, picked / self._repetition, picked * self._repetition)
        picked -= self._offsets[:num_seen]
        logits[ids] = picked


class Sampler:
    """Samples batches on a runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._memory = aligned_zeros((0, 0), np.float32)
        self.library_s = 0.0  # seconds that the last call spent in compiled code

    def sample(self, logits: NDArray[np.float32], rows: Sequence[SequenceSampler]) -> list[Sampled]:
        """Choose a token for each row of logits (r, v), which are changed in place.

        The first of the likeliest is taken where nothing is drawn. A row with NaN or without a
        finite largest logit yields an error; the others are not affected.
        """
        raw: dict[int, NDArray[np.float32]] = {}
        ended: dict[int, Sampled] = {}
        with np.errstate(over="ignore", invalid="ignore"):
            for index, row in enumerate(rows):
                if not row.adjusts:
                    continue
                if row.params.logprobs is not None:
                    raw[index] = logits[index].copy()
                try:
                    if not row.adjust(logits[index]):
                        ended[index] = Sampled(-1, is_end=True)
                except RequestError as error:
                    ended[index] = Sampled(-1, error=error)
        # A NaN counts as the largest, so that one look at the largest finds it.
        tokens = [int(values.argmax()) for values in logits]
        is_sound = [math.isfinite(logits[index, token]) for index, token in enumerate(tokens)]
        drawn = [index for index, row in enumerate(rows) if is_sound[index] and not row.is_greedy]
        self.library_s = 0.0
        if drawn:
            chosen = self._draw(logits, drawn, [rows[index] for index in drawn])
            for index, token in zip(drawn, chosen, strict=True):
                tokens[index] = token
        sampled = []
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if index in ended:
                sampled.append(ended[index])
            elif not is_sound[index]:
                sampled.append(Sampled(-1, error=_not_finite()))
            elif row.params.logprobs is None:
                sampled.append(Sampled(token))
            else:
                logprobs = token_logprobs(
                    raw.get(index, logits[index]),
                    token,
                    row.params.logprobs,
                    row.params.logprob_token_ids,
                )
                sampled.append(Sampled(token, logprobs))
        return sampled

    def _draw(
        self, logits: NDArray[np.float32], indices: list[int], rows: Sequence[SequenceSampler]
    ) -> list[int]:
        """Return the tokens that `rows` draw from the logits at `indices`."""
        if len(indices) < len(logits):
            logits = self._gather(logits, indices)
        params = [row.params for row in rows]
        settings = SampleRows(
            temperature=np.asarray([param.temperature for param in params], np.float32),
            top_p=np.asarray([param.top_p for param in params], np.float32),
            min_p=np.asarray([param.min_p for param in params], np.float32),
            top_k=np.asarray([param.top_k for param in params], np.int32),
            uniform=np.asarray([row.draw() for row in rows]),
        )
        start = time.perf_counter()
        tokens: list[int] = self._runner.sample(logits, settings).tolist()
        self.library_s = time.perf_counter() - start
        return tokens

    def _gather(self, logits: NDArray[np.float32], indices: list[int]) -> NDArray[np.float32]:
        """Return copies of rows where compiled code reads them in place, until the next call."""
        if self._memory.shape[0] < len(indices) or self._memory.shape[1] != logits.shape[1]:
            self._memory = aligned_zeros(logits.shape, np.float32)
        # mode: any other makes a further copy on the way.
        return np.take(logits, indices, axis=0, out=self._memory[: len(indices)], mode="clip")


def token_logprobs(
    logits: NDArray[np.float32], token_id: int, num_top: int, others: Sequence[int] = ()
) -> TokenLogprobs:
    """Return the log-probability of a token and of the `num_top` likeliest, from a row (v).

    others: tokens to tell of in place of the likeliest, in this order.
    Of equally likely tokens the one with the lower id comes first. Nothing is below -9999; a row
    without a finite largest logit gives that and no likeliest tokens.
    """
    best = logits.max()
    if not math.isfinite(best):
        return TokenLogprobs(token_id, _LOWEST_LOGPROB)
    weights = logits - best
    np.exp(weights, out=weights)
    log_sum = float(best) + math.log(float(weights.sum()))

    def logprob(token: int) -> float:
        return max(float(logits[token]) - log_sum, _LOWEST_LOGPROB)

    told = others or _find_likeliest(logits, num_top)
    top = tuple((token, logprob(token)) for token in told)
    return TokenLogprobs(token_id, logprob(token_id), top)


def _find_likeliest(logits: NDArray[np.float32], count: int) -> list[int]:
    """Return the ids of the `count` largest, the largest first, of equals the lower id first."""
    if count == 0:
        return []
    largest = np.maximum.reduceat(logits, np.arange(0, len(logits), _BLOCK))  # of each block
    if len(largest) > count:
        # At least `count` values are as large as the count-th largest of these.
        bound = np.partition(largest, len(largest) - count)[len(largest) - count]
        candidates = np.flatnonzero(logits >= bound)
    else:
        candidates = np.arange(len(logits))
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    likeliest: list[int] = candidates[order].tolist()
    return likeliest


def _draw_key(seed: int | None, index: int) -> bytes:
    """Return what tells a sequence's draws from all others."""
    if seed is None:
        return os.urandom(16)
    return seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little")


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def _not_finite() -> StepFailed:
    return StepFailed(
        "the model's logits for the request are not finite (NaN or infinity), no token can be "
        "chosen; try again, and convert the model anew where that does not help"
    )
