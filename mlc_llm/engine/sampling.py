"""Sampling: what a user may set, and the choice of one token from one row of logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import ChatConfig
from mlc_llm.errors import OptionError
from mlc_llm.runtime.runner import ModelRunner, SampleRows

# Below this temperature the most likely token is taken.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; checked when made. Raises OptionError."""

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_count("max_tokens", self.max_tokens, 1)
        _check_count("seed", self.seed, 0)
        if any(not text for text in self.stop):
            raise OptionError("stop strings must not be empty")

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


def _check_range(name: str, value: float, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise OptionError(f"{name} must be a number from {low:g} to {high:g}, is {value!r}")


def _check_count(name: str, value: int | None, low: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not is_int or value < low):
        raise OptionError(f"{name} must be a whole number of at least {low}, is {value!r}")


def choose_token(
    runner: ModelRunner,
    logits: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    random: np.random.Generator,
) -> int:
    """Choose a token from logits (vocab) float32.

    Order: repetition penalty (Keskar et al. 2019) over prompt and output, presence and frequency
    penalties over the output, temperature, nucleus (Holtzman et al. 2020).
    """
    logits = _penalize(logits, params, prompt, generated)
    if params.temperature < GREEDY_TEMPERATURE or params.top_p == 0.0:
        return int(np.argmax(logits))
    rows = SampleRows(
        temperature=np.asarray([params.temperature], np.float32),
        top_p=np.asarray([params.top_p], np.float32),
        min_p=np.zeros(1, np.float32),
        top_k=np.zeros(1, np.int32),
        uniform=np.asarray([random.random()]),
    )
    return int(runner.sample(logits[None], rows)[0])


def _penalize(
    logits: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
) -> NDArray[np.float32]:
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray([*prompt, *generated], np.int64))
        logits = logits.copy()
        picked = logits[seen]
        factor = np.float32(params.repetition_penalty)
        logits[seen] = np.where(picked > 0, picked / factor, picked * factor)
    if generated and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = np.unique(np.asarray(generated, np.int64), return_counts=True)
        logits = logits.copy()
        logits[tokens] -= np.float32(params.presence_penalty) + counts.astype(
            np.float32
        ) * np.float32(params.frequency_penalty)
    return logits
