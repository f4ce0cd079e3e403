"""Expressions on 16-lane float32 vectors that LLVM would otherwise turn into scalar calls."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

LANES = 16
# Most negative score: finite, so that masked rows stay free of NaN.
MASKED = -1.0e30

# Taylor coefficients ln(2)^k / k! of 2^f; |f| <= 0.5 leaves a relative error below 2e-8.
_EXP2_COEFFICIENTS = (
    1.5252733804059841e-05,
    1.5403530393381606e-04,
    1.3333558146428443e-03,
    9.6181291076284772e-03,
    5.5504108664821580e-02,
    2.4022650695910072e-01,
    6.9314718055994531e-01,
    1.0,
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
    """Return e**x per lane, relative error about 1e-7; arguments below -87 give about 0.

    Cody and Waite 1980, chapter 6: 2**n * 2**f with |f| <= 0.5 and a polynomial for 2**f.
    """
    clamped = T.max(T.min(x, splat(T.float32(88.0), lanes)), splat(T.float32(-87.0), lanes))
    whole = T.nearbyint(clamped * splat(T.float32(1.4426950408889634), lanes))
    # Two-part ln(2) keeps the remainder exact to float32.
    rest = clamped - whole * splat(T.float32(0.693359375), lanes)
    rest = rest - whole * splat(T.float32(-2.12194440e-4), lanes)
    fraction = rest * splat(T.float32(1.4426950408889634), lanes)
    poly = splat(T.float32(_EXP2_COEFFICIENTS[0]), lanes)
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        poly = poly * fraction + splat(T.float32(coefficient), lanes)
    exponent = T.Cast(lane_dtype("int32", lanes), whole) + splat(T.int32(127), lanes)
    bits = T.shift_left(exponent, splat(T.int32(23), lanes))
    return poly * T.reinterpret(lane_dtype("float32", lanes), bits)


def silu(x: Any, lanes: int = LANES) -> Any:
    """Return x / (1 + e**-x) per lane."""
    return x / (splat(T.float32(1), lanes) + exp(-x, lanes))


def reduce_sum(x: Any, lanes: int = LANES) -> Any:
    """Return the sum of all lanes (order is LLVM's sequential one)."""
    if lanes == 1:
        return x
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.fadd.v{lanes}f32")
    return T.call_llvm_pure_intrin(intrinsic, T.float32(0), x, dtype="float32")


def reduce_max(x: Any, lanes: int = LANES) -> Any:
    """Return the largest lane."""
    if lanes == 1:
        return x
    intrinsic = T.llvm_lookup_intrinsic_id(f"llvm.vector.reduce.fmax.v{lanes}f32")
    return T.call_llvm_pure_intrin(intrinsic, x, dtype="float32")


def vector_lanes(extent: int) -> int:
    """Return the widest power of two up to 16 that divides `extent`."""
    lanes = LANES
    while extent % lanes:
        lanes //= 2
    return lanes
