"""A sequence: one of a request's n continuations, its tokens and where their K and V are."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlc_llm.engine.metrics import RequestStats
from mlc_llm.engine.prefix_cache import PrefixNode
from mlc_llm.engine.request import Request, TokenLogprobs
from mlc_llm.engine.sampler import SequenceSampler

# Tokens that one sequence may bring to a step beside others that generate: those a grammar forced,
# and what is left of a sequence that was preempted. More are computed like a prompt, in pieces.
_MAX_DECIDED = 16


@dataclass(eq=False)
class RequestState:
    """A request under way.

    forks: sequences that begin when the prompt has been computed once. prompt_logprobs grows while
    it is.
    """

    request: Request
    arrival: int
    stats: RequestStats
    sequences: list[Sequence] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(eq=False)
class Sequence:
    """Tokens, prompt first, of which `num_computed` have K and V in `pages`.

    tokens   ├── prompt ──┬── generated ──┤
             ├── computed ──────┼─ left ──┤   left is 1 between steps of decoding, more where
                                              a grammar has forced tokens after the one chosen
    pages    [ p0 ][ p1 ][ p2 ] ...           page i holds tokens i * page_size ..

    node is where the next whole page goes in the prefix cache, None where it is not to be kept.
    state_slot holds the recurrent state after the computed tokens, in models that have one, while
    the sequence runs; what state_stops and snapshot are is the state cache's business.
    """

    state: RequestState
    index: int
    tokens: list[int]
    num_prompt_tokens: int
    sampler: SequenceSampler
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    node: PrefixNode | None = None
    num_cached_pages: int = 0
    state_slot: int | None = None
    state_stops: tuple[int, ...] = ()
    snapshot: PrefixNode | None = None
    is_finished: bool = False

    def cache_keys(self, start: int, end: int) -> list[int]:
        """Return what the prefix cache knows the tokens `start .. end` by.

        In place of an image's tokens, which are all the same, stands a number that only equal
        images have.
        """
        keys = self.tokens[start:end]
        for image in self.state.request.images:
            low, high = max(image.first, start), min(image.end, end)
            if low < high:
                keys[low - start : high - start] = [image.key] * (high - low)
        return keys

    @property
    def num_left(self) -> int:
        """Tokens without K and V yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_generating(self) -> bool:
        """Return whether all that is left has been generated, and little: decided tokens."""
        if self.num_left == 1:
            return True
        return self.num_computed >= self.num_prompt_tokens and self.num_left <= _MAX_DECIDED

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int, int]:
        """What decides who is served first; no two are equal."""
        return (self.state.request.priority, self.state.arrival, self.index)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Return whether logits at prompt tokens are still to be read."""
        known = self.state.prompt_logprobs
        return self.index == 0 and known is not None and len(known) < self.num_prompt_tokens
