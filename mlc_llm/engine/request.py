"""What the engine is asked and what it answers: plain data, no logic of scheduling or text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlc_llm.engine.grammar import GrammarSpec
from mlc_llm.engine.metrics import RequestStats
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import MlcError
from mlc_llm.images.inputs import PromptImage

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Request:
    """Tokens to continue, n times over.

    prompt: at least one token id. stop_token_ids end a sequence and are not part of its output.
    priority: lower ones are served first, equal ones in order of arrival. cache_salt: only
    requests with the same salt share cached prompt pages. prompt_logprobs: number of likeliest
    tokens to report at each place of the prompt (0 for the prompt's own token alone). images: in
    the order of their places, which the prompt fills with the model's token for images. grammar:
    what the text of each sequence must match; a sequence whose grammar ends has met a stop.
    """

    request_id: str
    prompt: Sequence[int]
    params: SamplingParams
    n: int = 1
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    cache_salt: str = ""
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place, before temperature and truncation.

    top: the likeliest tokens and their values, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Output:
    """What one step brought to one sequence of a request.

    index: which of the request's n sequences. token_id is None where the step only ended the
    sequence (a stop token, an abort, an error). prompt_logprobs comes once, with sequence 0's first
    output: one entry a prompt token, None for the first. error is set exactly where finish_reason
    is "error".
    """

    request_id: str
    index: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: MlcError | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
