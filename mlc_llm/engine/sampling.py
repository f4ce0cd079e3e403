"""Sampling: what a user may set. How tokens are then chosen is in `sampler.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlc_llm.artifact import ChatConfig
from mlc_llm.errors import OptionError, RequestError

# Below this temperature the most likely token is taken.
GREEDY_TEMPERATURE = 1e-5
# What one request may ask for, so that none can fill memory or time.
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LEN = 1024  # characters
_MAX_COUNT = 2**31 - 1
_MAX_SEED = 2**63 - 1

LogitBias = Mapping[int, float] | Sequence[tuple[int, float]]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; checked when made. Raises OptionError.

    temperature 0 takes the likeliest token. top_k 0, top_p 1 and min_p 0 leave all tokens in.
    logit_bias: what is added to the logits of tokens, -100 to 100, by id; kept as pairs in order of
    ids. logprobs: number of likeliest tokens to report with each token, 0 for the token alone, None
    for nothing. logprob_token_ids: tokens to report in place of the likeliest, unless logprobs is
    None. min_tokens: tokens before a stop token may be chosen. seed: the same seed gives the same
    tokens, whatever else runs. stop: texts that end the answer and are not part of it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: LogitBias = ()
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_count("top_k", self.top_k, 0)
        _check_count("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise OptionError(
                    f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}"
                )
        if self.seed is not None:
            _check_count("seed", self.seed, -_MAX_SEED - 1, _MAX_SEED)
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos must be true or false, is {_show(self.ignore_eos)}")
        # Lists and mappings are kept in a form that cannot change and has a hash.
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError unless all tokens named exist."""
        assert all(0 <= token < vocab_size for token in self.logprob_token_ids)
        for token in dict(self.logit_bias):
            if token >= vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}, the vocabulary has {vocab_size:,} tokens; "
                    "leave it out",
                    "logit_bias",
                )

    @classmethod
    def from_config(cls, config: ChatConfig) -> SamplingParams:
        """Return the defaults that a model comes with."""
        return cls(
            temperature=config.temperature,
            top_p=config.top_p,
            frequency_penalty=config.frequency_penalty,
            presence_penalty=config.presence_penalty,
            repetition_penalty=config.repetition_penalty,
        )

    def with_changes(self, **changes: Any) -> SamplingParams:
        """Return a copy with some fields replaced. Raises OptionError."""
        return dataclasses.replace(self, **changes)


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # a NaN is in no range
        raise OptionError(f"{name} must be a number from {low:g} to {high:g}, is {_show(value)}")


def _check_count(name: str, value: Any, low: int, high: int = _MAX_COUNT) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not low <= value <= high:
        raise OptionError(
            f"{name} must be a whole number from {low:,} to {high:,}, is {_show(value)}"
        )


def _stop_strings(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) for text in stop):
        raise OptionError(f"stop must be a list of texts, is {_show(stop)}")
    if len(stop) > MAX_STOPS:
        raise OptionError(f"stop has {len(stop):,} texts, at most {MAX_STOPS} are allowed")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_LEN:
            raise OptionError(
                f"stop has a text of {len(text):,} characters; 1 to {MAX_STOP_LEN:,} are allowed"
            )
    return tuple(stop)


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    if isinstance(bias, Mapping):
        bias = tuple(bias.items())
    if not isinstance(bias, (tuple, list)):
        raise OptionError(f"logit_bias must map token ids to numbers, is {_show(bias)}")
    if len(bias) > MAX_LOGIT_BIAS:
        raise OptionError(
            f"logit_bias names {len(bias):,} tokens, at most {MAX_LOGIT_BIAS:,} are allowed"
        )
    value_of: dict[int, float] = {}
    for pair in bias:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise OptionError(
                f"logit_bias must have pairs of token id and number, has {_show(pair)}"
            )
        token, value = pair
        _check_count("a token id in logit_bias", token, 0)
        _check_range(f"logit_bias of token {token}", value, -100.0, 100.0)
        if token in value_of:
            raise OptionError(f"logit_bias names token {token} twice")
        value_of[token] = float(value)
    return tuple(sorted(value_of.items()))


def _show(value: object) -> str:
    """Return a value that a user gave, in few characters whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}...")
    return f"a {type(value).__name__}"
