"""Find the parameters of `llama3` RoPE scaling from the per-frequency divisors GGUF stores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import UnsupportedModel

_TOLERANCE = 1e-4
_MAX_CONTEXT = 1 << 40
_STANDARD_CONTEXT, _STANDARD_LOW, _STANDARD_HIGH = 8192, 1.0, 4.0


def find_llama3_scaling(
    factors: NDArray[np.float64], rope_theta: float, head_dim: int, where: str
) -> dict[str, Any] | None:
    """Return a `rope_scaling` object that makes these divisors, None if all of them are 1.

    factors: (head_dim / 2,), what each rotary frequency is divided by.
    Raises UnsupportedModel if they are not of this kind; `where` names the file.
    """
    problem = UnsupportedModel(f"{where} has RoPE factors that are not llama3 scaling")
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise problem
    if np.allclose(factors, 1.0, rtol=_TOLERANCE):
        return None
    if rope_theta <= 0:
        raise problem
    frequencies = rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    largest = float(str(np.float32(factors.max())))
    # Factors of a damaged file may be extreme; then no candidate fits.
    with np.errstate(all="ignore"):
        for context, low, high in _candidates(factors, frequencies, largest):
            expected = llama3_factors(frequencies, largest, low, high, context)
            if np.allclose(expected, factors, rtol=_TOLERANCE):
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": context,
                }
    raise problem


def llama3_factors(
    frequencies: NDArray[np.float64], factor: float, low: float, high: float, context: int
) -> NDArray[np.float64]:
    """Return the divisors of `llama3` scaling: 1 at high frequencies, `factor` at low ones.

    In between 1 / divisor grows in a straight line with the turns made within `context` tokens;
    there is no such line where both bounds are the same.
    """
    turns = context * frequencies / (2 * math.pi)
    if low == high:
        return np.where(turns > high, 1.0, factor)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float64] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def _candidates(
    factors: NDArray[np.float64], frequencies: NDArray[np.float64], largest: float
) -> list[tuple[int, float, float]]:
    """Return (context, low, high) to try: usual ones, then one solved from the ramp or the step.

    Only context / low and context / high matter, so `low` may be fixed at 1.
    """
    candidates = [(_STANDARD_CONTEXT, _STANDARD_LOW, high) for high in (_STANDARD_HIGH, 1.0)]
    num_plain = int((factors < 1 + _TOLERANCE).sum())
    if 0 < num_plain < len(factors):
        # Any length of text does that makes just one turn between these two frequencies.
        between = math.sqrt(frequencies[num_plain - 1] * frequencies[num_plain])
        candidates.append((round(2 * math.pi / between), 1.0, 1.0))
    ramp = np.flatnonzero((factors > 1 + _TOLERANCE) & (factors < largest * (1 - _TOLERANCE)))
    if len(ramp) >= 2:
        ends = ramp[[0, -1]]
        smooth = (1 / factors[ends] - 1 / largest) / (1 - 1 / largest)
        turns = frequencies[ends] / (2 * math.pi)  # per token
        slope = (smooth[1] - smooth[0]) / (turns[1] - turns[0])
        offset = smooth[0] - slope * turns[0]
        context, high = slope / -offset, 1 - 1 / offset
        if 1 <= context < _MAX_CONTEXT and 1 < high < _MAX_CONTEXT:
            candidates.append((round(context), 1.0, float(round(high, 3))))
    return candidates
