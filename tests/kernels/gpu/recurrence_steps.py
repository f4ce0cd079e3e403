"""Steps of recurrent kernels for GPUs, and what NumPy makes of them.

A step of three sequences of different lengths: one begins, two go on from states in other slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.kernels.gpu import delta_rule, recurrence

# Runs a kernel on tensors by the names of its arguments; returns what they hold then.
Run = Callable[..., dict[str, np.ndarray]]

# Tokens of each sequence, and the position of its first one; tokens of all, one each.
STEPS = {"ragged": ([5, 1, 21], [0, 7, 3]), "single": ([1, 1, 1], [4, 0, 2])}
SLOTS = np.array([2, 0, 3], np.int32)
NUM_SLOTS = 4
TOLERANCE = {"float32": 3e-5, "float16": 4e-3}


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def check(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=tolerance, rtol=0)


def run_step(
    run: Run,
    kernel: Any,
    step: tuple[list[int], list[int]],
    state: np.ndarray,
    out: np.ndarray,
    **tensors: np.ndarray,
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Run a recurrence; return rows and new states of each sequence, and the state of nobody."""
    counts, starts = step
    ends = np.cumsum([0, *counts]).astype(np.int32)
    # What begins is to find zeros, whatever is in its slot.
    before = state.copy()
    before[[slot for slot, start in zip(SLOTS, starts, strict=True) if start == 0]] = np.nan
    positions = [np.arange(s, s + c) for c, s in zip(counts, starts, strict=True)]
    found = run(
        kernel,
        **tensors,
        positions=np.concatenate(positions).astype(np.int32),
        query_start=ends,
        slots=SLOTS,
        state=before,
        out=out,
    )
    return np.split(found["out"], ends[1:-1]), list(found["state"][SLOTS]), found["state"][1]


def sequences(
    step: tuple[list[int], list[int]], state: np.ndarray, *rows: np.ndarray
) -> list[tuple[np.ndarray, ...]]:
    """Return the state and rows of each sequence, float64."""
    counts, starts = step
    parts = [np.split(x.astype(np.float64), np.cumsum(counts)[:-1]) for x in rows]
    states = [
        state[slot].astype(np.float64) * (start > 0)
        for slot, start in zip(SLOTS, starts, strict=True)
    ]
    return list(zip(states, *parts, strict=True))


def check_wkv(run: Run, dtype: str, step: Any, size: int, is_dynamic: bool) -> None:
    """Run RWKV's linear attention of heads of a size; compare results and new states."""
    n, heads = sum(step[0]), 2
    r, k, v = (normal((n, heads * size), dtype, seed) for seed in range(3))
    decay = np.exp(-np.exp(normal((n if is_dynamic else 1, heads * size), seed=3)))
    bonus, state = normal((heads, size), seed=4), normal((NUM_SLOTS, heads, size, size), seed=5)
    kernel = recurrence.wkv(heads, size, dtype, "float32", is_dynamic)
    given = {"r": r, "k": k, "v": v, "decay": decay, "bonus": bonus}
    out = np.zeros((n, heads * size), np.float32)
    found, states, rest = run_step(run, kernel, step, state, out, **given)
    np.testing.assert_array_equal(rest, state[1])
    wide_decay = np.broadcast_to(decay, r.shape)
    for i, (held, *rows) in enumerate(sequences(step, state, r, k, v, wide_decay)):
        heads_of = (x.reshape(-1, heads, size) for x in rows)
        expected = []
        for r_t, k_t, v_t, w_t in zip(*heads_of, strict=True):
            product = np.einsum("hi,hj->hij", k_t, v_t)
            expected.append(np.einsum("hi,hij->hj", r_t, bonus[:, :, None] * product + held))
            held = w_t[:, :, None] * held + product
        check(found[i], np.reshape(expected, found[i].shape), "float32")
        check(states[i], held, "float32")


def check_gated_delta_rule(run: Run, dtype: str, step: Any, shape: DeltaShape) -> None:
    """Run the gated delta rule; compare results and new states."""
    n, heads, keys = sum(step[0]), shape.num_heads, shape.num_key_heads * shape.key_dim
    qkv = normal((n, shape.width), dtype)
    a, b = (normal((n, heads), dtype, seed) for seed in (1, 2))
    a_log, dt_bias = (normal((heads,), seed=seed) for seed in (3, 4))
    state = normal((NUM_SLOTS, heads, shape.key_dim, shape.value_dim), seed=5)
    kernel = delta_rule.gated_delta_rule(shape, dtype, "float32")
    given = {"qkv": qkv, "a": a, "b": b, "a_log": a_log, "dt_bias": dt_bias}
    out = np.zeros((n, heads * shape.value_dim), np.float32)
    found, states, rest = run_step(run, kernel, step, state, out, **given)
    np.testing.assert_array_equal(rest, state[1])
    for i, (held, rows, a_rows, b_rows) in enumerate(sequences(step, state, qkv, a, b)):
        q, k, v = np.split(rows, [keys, 2 * keys], axis=1)
        q, k = (x.reshape(-1, shape.num_key_heads, shape.key_dim) for x in (q, k))
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        q, k = (np.repeat(x, heads // shape.num_key_heads, axis=1) for x in (q, k))
        decay = np.exp(-np.exp(a_log) * np.logaddexp(0, a_rows + dt_bias))
        expected = []
        for t, v_t in enumerate(v.reshape(-1, heads, shape.value_dim)):
            held = held * decay[t][:, None, None]
            change = sigmoid(b_rows[t])[:, None] * (v_t - np.einsum("hi,hij->hj", k[t], held))
            held = held + np.einsum("hi,hj->hij", k[t], change)
            expected.append(np.einsum("hi,hij->hj", q[t], held) / np.sqrt(shape.key_dim))
        check(found[i], np.reshape(expected, found[i].shape), "float32")
        check(states[i], held, "float32")
