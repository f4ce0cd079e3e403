"""Expressions on 16-lane float32 vectors that LLVM would otherwise turn into scalar calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

LANES = 16
# The score of what is not seen: finite, so that rows without any key stay free of NaN. Maxima start
# above it, which makes its weight exactly 0.
MASKED, LOWEST = -1.0e30, -1.0e29

LOG2_E = 1.4426950408889634

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

# The same for 2^r, |r| <= 1 / 2: relative error 1e-7, exactly 1 at 0.
_EXP2_COEFFICIENTS = (
    0.001326472724,
    0.009671512823,
    0.05550733745,
    0.2402224208,
    0.6931469776,
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


def multiply_add(x: Any, y: Any, z: Any, lanes: int = LANES) -> Any:
    """Return x * y + z per lane, rounded once where the CPU can.

    Written as an operator, LLVM chooses by what stands around it whether and which product of a
    sum is fused, so that one formula can round differently in two kernels.
    """
    kind = "f32" if lanes == 1 else f"v{lanes}f32"
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.fmuladd.{kind}")
    return T.call_llvm_pure_intrin(intrinsic, x, y, z, dtype=lane_dtype("float32", lanes))


def prefetch(pointer: Any) -> Any:
    """Return a call that fetches the cache line at `pointer`; it may lie past the end."""
    intrinsic = T.llvm_lookup_intrinsic_id("llvm.prefetch.p0")
    return T.call_llvm_intrin(intrinsic, pointer, T.int32(0), T.int32(3), T.int32(1), dtype="void")


def exp(x: Any, lanes: int = LANES) -> Any:
    """Return e**x per lane; arguments below -87.7 give exactly 0.

    Cody and Waite 1980, chapter 6: 2**n * e**r with |r| <= ln(2) / 2 and a polynomial for e**r.
    The relative error is below 3e-7.
    """
    # At the lower bound n is -127.
    clamped = T.max(T.min(x, splat(T.float32(88.0), lanes)), splat(T.float32(-88.0), lanes))
    whole = T.nearbyint(clamped * splat(T.float32(LOG2_E), lanes))
    # ln(2) in two parts: products with the first are exact.
    rest = multiply_add(whole, splat(T.float32(-0.693359375), lanes), clamped, lanes)
    rest = multiply_add(whole, splat(T.float32(2.12194440e-4), lanes), rest, lanes)
    poly = splat(T.float32(_EXP_COEFFICIENTS[0]), lanes)
    for coefficient in _EXP_COEFFICIENTS[1:]:
        poly = multiply_add(poly, rest, splat(T.float32(coefficient), lanes), lanes)
    return poly * _power_of_two(whole, lanes)


def exp2(x: Any, lanes: int = LANES) -> Any:
    """Return 2**x per lane for x below 127; arguments below -126.5 give exactly 0.

    2**n * 2**r with |r| <= 1/2 and a polynomial for 2**r. The relative error is below 2e-7.
    """
    clamped = T.max(x, splat(T.float32(-127.0), lanes))
    whole = T.nearbyint(clamped)
    rest = clamped - whole
    poly = splat(T.float32(_EXP2_COEFFICIENTS[0]), lanes)
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        poly = multiply_add(poly, rest, splat(T.float32(coefficient), lanes), lanes)
    return poly * _power_of_two(whole, lanes)


def _power_of_two(whole: Any, lanes: int) -> Any:
    """Return 2**n per lane for whole n from -126 on, and 0 for -127."""
    exponent = T.Cast(lane_dtype("int32", lanes), whole) + splat(T.int32(127), lanes)
    bits = T.shift_left(exponent, splat(T.int32(23), lanes))
    return T.reinterpret(lane_dtype("float32", lanes), bits)


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
