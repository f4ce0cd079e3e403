"""How much of a prompt fits into a step: not to stall who generates, nor who wants to leave."""

from __future__ import annotations

# A step with a piece of a prompt may take this many times a step without. Streams then keep their
# pace while prompts are read nearly as fast as alone: prompts are bound by arithmetic, not memory.
MAX_SLOWDOWN = 2.0
# Pieces are not smaller than this, so that prompts go on in any case.
MIN_PIECE = 3
# Seconds that a step of prompts alone may take: aborts and newcomers wait that long.
MAX_PROMPT_STEP_S = 0.5
# While nothing is known: of a step of prompts alone, and beside sequences that generate.
_FIRST_ALONE = 256
_FIRST_BESIDE = 8
_SMOOTHING = 0.2  # weight of the newest step in running means


class StepBudget:
    """Learns from the durations of steps what a decode step and a prompt token cost."""

    def __init__(self, max_prompt_tokens: int) -> None:
        self._max = max_prompt_tokens
        self._decode_s: float | None = None
        self._beside_s: float | None = None  # a prompt token beside sequences that generate
        self._alone_s: float | None = None  # and one of a step of prompts alone
        self._last_beside = _FIRST_BESIDE

    def prompt_tokens(self, num_decodes: int, num_prompts: int) -> int:
        """Return the tokens of prompts that may be in the next step.

        The more prompts wait for each sequence that generates, the larger the piece: holding up
        one to serve many is the shorter wait for all.
        """
        if num_decodes == 0:
            alone = _FIRST_ALONE if self._alone_s is None else MAX_PROMPT_STEP_S / self._alone_s
            return self._limit(alone)
        if self._decode_s is None or self._beside_s is None:
            return self._limit(_FIRST_BESIDE)
        slowdown = max(MAX_SLOWDOWN, 1 + num_prompts / num_decodes)
        fitting = (slowdown - 1) * self._decode_s / self._beside_s
        # Small pieces cost more a token than large ones: grow step by step.
        return self._limit(min(fitting, 2 * self._last_beside))

    def _limit(self, count: float) -> int:
        return min(max(int(count), MIN_PIECE), self._max)

    def record(self, num_decode_tokens: int, num_prompt_tokens: int, duration_s: float) -> None:
        """Learn from a step that took `duration_s` seconds."""
        if num_prompt_tokens == 0:
            self._decode_s = _smooth(self._decode_s, duration_s)
        elif num_decode_tokens == 0:
            if num_prompt_tokens >= _FIRST_BESIDE:  # less says little of the cost of a token
                self._alone_s = _smooth(self._alone_s, max(duration_s, 1e-9) / num_prompt_tokens)
        elif self._decode_s is not None:
            extra_s = max(duration_s - self._decode_s, 1e-9)
            self._beside_s = _smooth(self._beside_s, extra_s / num_prompt_tokens)
            self._last_beside = num_prompt_tokens


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
