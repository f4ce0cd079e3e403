"""Recurrences against NumPy in float64, token after token; chunks and company change no bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import delta_rule, recurrence
from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.runtime.memory import aligned_zeros

pytestmark = pytest.mark.cpu

NUM_SLOTS = 5
Array = NDArray[Any]


@dataclass
class Recurrence:
    """A kernel with a state, and constant arguments; `run` works on chunks of sequences."""

    kernel: Any
    state_shape: tuple[int, ...]
    width: int
    constants: tuple[Array, ...] = ()

    def __post_init__(self) -> None:
        self.state = aligned_zeros((NUM_SLOTS, *self.state_shape), np.float32)
        # What a slot held before must not matter at position 0.
        self.state[...] = 1e3

    def run(self, *work: tuple[int, int, tuple[Array, ...]]) -> list[Array]:
        """Run one step of (slot, first position, rows of each argument) a sequence."""
        counts = [len(rows[0]) for _, _, rows in work]
        rows = [np.concatenate(parts) for parts in zip(*(rows for _, _, rows in work), strict=True)]
        positions = np.concatenate(
            [np.arange(first, first + n) for (_, first, _), n in zip(work, counts, strict=True)]
        )
        starts = np.cumsum([0, *counts])
        slots = np.asarray([slot for slot, _, _ in work])
        steps = [array.astype(np.int32) for array in (positions, starts, slots)]
        shape = (int(starts[-1]), self.width)
        out = self.kernel(*rows, *self.constants, *steps, self.state, shape=shape)
        return np.split(out, starts[1:-1])


def check_cuts(recurrence: Recurrence, first: tuple[Array, ...], second: tuple[Array, ...]) -> None:
    """Assert that pieces, single tokens and company give the bits of a whole sequence alone."""
    whole = recurrence.run((3, 0, first))[0]
    state = recurrence.state[3].copy()
    other = recurrence.run((1, 0, second))[0]

    def part(rows: tuple[Array, ...], start: int, end: int) -> tuple[Array, ...]:
        return tuple(array[start:end] for array in rows)

    n, m = len(first[0]), len(second[0])
    found, found_other = [], []
    for start, end in ((0, 1), (1, 4), (4, n - 1), (n - 1, n)):
        work = [(0, start, part(first, start, end))]
        if end <= m:
            work.insert(0, (4, start, part(second, start, end)))
        *others, own = recurrence.run(*work)
        found.append(own)
        found_other += others
    np.testing.assert_array_equal(np.concatenate(found), whole)
    np.testing.assert_array_equal(recurrence.state[0], state)
    together = np.concatenate(found_other)
    np.testing.assert_array_equal(together, other[: len(together)])
    assert len(together) >= 4


def split(rows: tuple[Array, ...], at: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return tuple(array[:at] for array in rows), tuple(array[at:] for array in rows)


@pytest.mark.parametrize("width", [36, 75])
def test_token_shift(build, rng, width):
    kernel = Recurrence(build(recurrence.token_shift(width)), (width,), width)
    rows = (rng.standard_normal((20, width)).astype(np.float32),)
    first, second = split(rows, 11)
    expected = np.concatenate([np.zeros((1, width)), first[0][:-1]])
    np.testing.assert_array_equal(kernel.run((2, 0, first))[0], expected)
    np.testing.assert_array_equal(kernel.state[2], first[0][-1])
    check_cuts(kernel, first, second)


@pytest.mark.parametrize(("channels", "taps"), [(24, 4), (15, 2), (32, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_conv(build, rng, channels, taps, dtype):
    weight = rng.standard_normal((channels, 1, taps)).astype(numpy_dtype(dtype))
    kernel = build(recurrence.causal_conv(channels, taps, dtype))
    conv = Recurrence(kernel, (taps - 1, channels), channels, (weight,))
    rows = (rng.standard_normal((22, channels)).astype(np.float32),)
    first, second = split(rows, 13)
    padded = np.concatenate([np.zeros((taps - 1, channels)), first[0].astype(np.float64)])
    total = sum(padded[j : j + 13] * weight[:, 0, j].astype(np.float64) for j in range(taps))
    found = conv.run((2, 0, first))[0]
    np.testing.assert_allclose(found, total / (1 + np.exp(-total)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(conv.state[2], padded[len(padded) - taps + 1 :])
    check_cuts(conv, first, second)


def numpy_wkv(r: Array, k: Array, v: Array, decay: Array, bonus: Array) -> Array:
    n, (heads, size) = len(r), bonus.shape
    out = np.zeros((n, heads, size))
    for h in range(heads):
        state = np.zeros((size, size))
        at = slice(h * size, (h + 1) * size)
        for t in range(n):
            outer = np.outer(k[t, at], v[t, at]).astype(np.float64)
            out[t, h] = r[t, at] @ (bonus[h][:, None] * outer + state)
            state = decay[min(t, len(decay) - 1), at][:, None] * state + outer
    return out.reshape(n, -1)


@pytest.mark.parametrize(("heads", "size"), [(3, 8), (2, 64), (1, 128)])
@pytest.mark.parametrize("is_dynamic", [True, False])
def test_wkv(build, rng, heads, size, is_dynamic):
    width = heads * size
    rows = [rng.standard_normal((21, width)).astype(np.float32) for _ in range(3)]
    bonus = rng.standard_normal((heads, size)).astype(np.float32)
    decay = rng.uniform(0.2, 1, (21 if is_dynamic else 1, width)).astype(np.float32)
    kernel = build(recurrence.wkv(heads, size, "float32", is_dynamic))
    if is_dynamic:
        args, constants = (*rows, decay), (bonus,)
    else:
        args, constants = tuple(rows), (decay, bonus)
    wkv = Recurrence(kernel, (heads, size, size), width, constants)
    first, second = split(args, 12)
    found = wkv.run((2, 0, first))[0]
    expected = numpy_wkv(*(array[:12] for array in rows), decay[:12], bonus)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    check_cuts(wkv, first, second)


def numpy_delta_rule(
    shape: DeltaShape, qkv: Array, a: Array, b: Array, a_log: Array, dt_bias: Array
) -> Array:
    n, keys = len(qkv), shape.num_key_heads * shape.key_dim
    x = qkv.astype(np.float64)
    q = x[:, :keys].reshape(n, -1, shape.key_dim)
    k = x[:, keys : 2 * keys].reshape(n, -1, shape.key_dim)
    v = x[:, 2 * keys :].reshape(n, -1, shape.value_dim)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    out = np.zeros(v.shape)
    for h in range(shape.num_heads):
        key_head = h * shape.num_key_heads // shape.num_heads
        state = np.zeros((shape.key_dim, shape.value_dim))
        for t in range(n):
            step = np.log1p(np.exp(float(a[t, h]) + float(dt_bias[h])))
            state = state * np.exp(-np.exp(float(a_log[h])) * step)
            beta = 1 / (1 + np.exp(-float(b[t, h])))
            error = v[t, h] - k[t, key_head] @ state
            state = state + beta * np.outer(k[t, key_head], error)
            out[t, h] = q[t, key_head] @ state / np.sqrt(shape.key_dim)
    return out.reshape(n, -1)


@pytest.mark.parametrize(
    "shape", [DeltaShape(2, 4, 8, 8), DeltaShape(1, 3, 12, 20), DeltaShape(2, 2, 128, 128)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_delta_rule(build, rng, shape, dtype):
    heads = shape.num_heads
    rows = (
        rng.standard_normal((19, shape.width)).astype(np.float32),
        (3 * rng.standard_normal((19, heads))).astype(np.float32),
        (3 * rng.standard_normal((19, heads))).astype(np.float32),
    )
    a_log = rng.uniform(-3, 2, heads).astype(numpy_dtype(dtype))
    dt_bias = rng.standard_normal(heads).astype(numpy_dtype(dtype))
    kernel = build(delta_rule.gated_delta_rule(shape, dtype))
    state_shape = (heads, shape.key_dim, shape.value_dim)
    delta = Recurrence(kernel, state_shape, heads * shape.value_dim, (a_log, dt_bias))
    first, second = split(rows, 11)
    found = delta.run((2, 0, first))[0]
    expected = numpy_delta_rule(shape, *first, a_log, dt_bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    check_cuts(delta, first, second)


def test_extreme_gates_stay_finite(build):
    shape = DeltaShape(1, 4, 8, 8)
    kernel = build(delta_rule.gated_delta_rule(shape, "float32"))
    zeros = np.zeros(4, np.float32)
    delta = Recurrence(kernel, (4, 8, 8), 32, (zeros + 4, zeros))
    extremes = np.asarray([[-1e4, -80, 80, 1e4]] * 3, np.float32)
    rows = (np.ones((3, shape.width), np.float32), extremes, extremes[:, ::-1].copy())
    assert np.isfinite(delta.run((0, 0, rows))[0]).all()
    assert np.isfinite(delta.state[0]).all()
