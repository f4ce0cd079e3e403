"""Expressions on 16-lane float32 vectors that LLVM would otherwise turn into scalar calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

LANES = 16
# Most negative score: finite, so that masked rows stay free of NaN.
MASKED = -1.0e30

# Minimax polynomial of e^r for |r| <= ln(2) / 2, highest power first: relative error 2e-7,
# and exactly 1 at 0.
_EXP_COEFFICIENTS = (
    0.008290272206,
    0.04189816117,
    0.1666763872,
    0.4999914765,
    0.999999702,
    1,
)


def splat(value: Any, lanes: int = LANES) -> Any:
    """Return `value` in every lane; one lane is a scalar."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def span(start: Any, lanes: int = LANES) -> Any:
    """Return the index of `lanes` neighbours from `start`; one lane is a scalar."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def lane_dtype(dtype: str, lanes: int = LANES) -> str:
    """Return the dtype of a vector of `lanes` lanes."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def exp(x: Any, lanes: int = LANES) -> Any:
    """Return e**x per lane; arguments below -87 give about 0.

    Cody and Waite 1980, chapter 6: 2**n * e**r with |r| <= ln(2) / 2 and a polynomial for e**r.
    The relative error is below 3e-7.
    """
    clamped = T.max(T.min(x, splat(T.float32(88.0), lanes)), splat(T.float32(-87.0), lanes))
    whole = T.nearbyint(clamped * splat(T.float32(1.4426950408889634), lanes))
    # ln(2) in two parts: products with the first are exact.
    rest = clamped - whole * splat(T.float32(0.693359375), lanes)
    rest = rest - whole * splat(T.float32(-2.12194440e-4), lanes)
    poly = splat(T.float32(_EXP_COEFFICIENTS[0]), lanes)
    for coefficient in _EXP_COEFFICIENTS[1:]:
        poly = poly * rest + splat(T.float32(coefficient), lanes)
    exponent = T.Cast(lane_dtype("int32", lanes), whole) + splat(T.int32(127), lanes)
    bits = T.shift_left(exponent, splat(T.int32(23), lanes))
    return poly * T.reinterpret(lane_dtype("float32", lanes), bits)


def silu(x: Any, lanes: int = LANES) -> Any:
    """Return x / (1 + e**-x) per lane."""
    return x / (splat(T.float32(1), lanes) + exp(-x, lanes))


def reduce_sum(x: Any, lanes: int = LANES) -> Any:
    """Return the sum of all lanes, halves first."""
    return _fold(x, lanes, lambda low, high: low + high)


def reduce_max(x: Any, lanes: int = LANES) -> Any:
    """Return the largest lane; lanes must not be NaN."""
    return _fold(x, lanes, T.max)


def _fold(x: Any, lanes: int, join: Callable[[Any, Any], Any]) -> Any:
    # LLVM's own reductions keep an order, or rules for NaN, that make them a chain of scalars.
    while lanes > 1:
        lanes //= 2
        low = T.Shuffle([x], list(range(lanes)))
        x = join(low, T.Shuffle([x], list(range(lanes, 2 * lanes))))
    return x


def vector_lanes(extent: int) -> int:
    """Return the widest power of two up to 16 that divides `extent`."""
    lanes = LANES
    while extent % lanes:
        lanes //= 2
    return lanes
