"""Kernels of recurrent layers for GPUs, run as WGSL, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from recurrence_steps import (
    NUM_SLOTS,
    STEPS,
    check,
    check_gated_delta_rule,
    check_wkv,
    normal,
    run_step,
    sequences,
    sigmoid,
)

from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.kernels.gpu import recurrence, recurrent_rows


@pytest.fixture(params=["float32", "float16"])
def dtype(request: Any, webgpu: Any) -> str:
    if request.param == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    return str(request.param)


@pytest.fixture(params=STEPS)
def step(request: Any) -> tuple[list[int], list[int]]:
    return STEPS[request.param]


def test_token_shift(webgpu: Any, dtype: str, step: Any) -> None:
    x, state = normal((sum(step[0]), 300), dtype), normal((NUM_SLOTS, 300), seed=1)
    kernel = recurrence.token_shift(300, dtype)
    found, states, rest = run_step(webgpu.run, kernel, step, state, np.zeros_like(x), x=x)
    np.testing.assert_array_equal(rest, state[1])
    for i, (last, rows) in enumerate(sequences(step, state, x)):
        np.testing.assert_array_equal(found[i][1:], rows[:-1])
        np.testing.assert_array_equal(found[i][0], last.astype(dtype))
        np.testing.assert_array_equal(states[i], rows[-1])


@pytest.mark.parametrize("taps", [2, 4])
def test_causal_conv(webgpu: Any, dtype: str, step: Any, taps: int) -> None:
    channels = 260
    x, weight = normal((sum(step[0]), channels), dtype), normal((channels, 1, taps), dtype, 1)
    state = normal((NUM_SLOTS, taps - 1, channels), seed=2)
    kernel = recurrence.causal_conv(channels, taps, dtype, dtype)
    given = {"x": x, "weight": weight}
    found, states, rest = run_step(webgpu.run, kernel, step, state, np.zeros_like(x), **given)
    np.testing.assert_array_equal(rest, state[1])
    for i, (kept, rows) in enumerate(sequences(step, state, x)):
        inputs = np.concatenate([kept, rows])
        total = sum(inputs[j : j + len(rows)] * weight[:, 0, j] for j in range(taps))
        check(found[i], total * sigmoid(total), dtype)
        np.testing.assert_array_equal(states[i], inputs[-(taps - 1) :])


# A thread has all 20 rows of a column; two have 36 each, and the third block 8 columns of use.
@pytest.mark.parametrize(("size", "is_dynamic"), [(20, False), (72, True)])
def test_wkv(webgpu: Any, dtype: str, step: Any, size: int, is_dynamic: bool) -> None:
    check_wkv(webgpu.run, dtype, step, size, is_dynamic)


@pytest.mark.parametrize(
    "shape", [DeltaShape(1, 2, 6, 5), DeltaShape(2, 2, 64, 40)], ids=["shared", "wide"]
)
def test_gated_delta_rule(webgpu: Any, dtype: str, step: Any, shape: DeltaShape) -> None:
    check_gated_delta_rule(webgpu.run, dtype, step, shape)


@pytest.fixture(params=[1, 5])
def n(request: Any) -> int:
    """One row, as in decoding, is known when a kernel is made; many are not."""
    return int(request.param)


def run_rows(
    webgpu: Any, factory: Any, n: int, *options: Any, shape: Any, dtype: str, **tensors: np.ndarray
) -> np.ndarray:
    kernel = factory(n if n == 1 else None, *options)
    found: np.ndarray = webgpu.run(kernel, **tensors, out=np.zeros(shape, dtype))["out"]
    return found


def test_mixing_with_the_token_before(webgpu: Any, dtype: str, n: int) -> None:
    x, y = normal((2, n, 36), dtype)
    weight, up = normal((1, 1, 36), dtype, 1), normal((3, 7, 36), dtype, 2)
    options = {"shape": x.shape, "dtype": dtype, "x": x, "y": y}
    found = run_rows(webgpu, recurrent_rows.lerp, n, 36, dtype, **options, weight=weight)
    wide, difference = x.astype(np.float64), y.astype(np.float64) - x
    check(found, wide + difference * weight[0], dtype)
    low = normal((n, 21), dtype, 3)
    found = run_rows(
        *(webgpu, recurrent_rows.low_rank_lerp, n, 36, 7, 3, 2, dtype),
        **options,
        low=low,
        up=up,
        base=weight,
    )
    mixed = weight[0] + low[:, 14:].astype(np.float64) @ up[2]
    check(found, wide + difference * mixed, dtype)


def test_products_and_decays(webgpu: Any, dtype: str, n: int) -> None:
    x, weight = normal((n, 40), dtype), normal((40, 36), dtype, 1)
    found = run_rows(
        *(webgpu, recurrent_rows.matmul_in_out, n, 40, 36, dtype),
        **{"shape": (n, 36), "dtype": dtype, "x": x, "weight": weight},
    )
    check(found, x.astype(np.float64) @ weight, dtype)
    base = normal((1, 1, 40), seed=2)
    found = run_rows(
        *(webgpu, recurrent_rows.dynamic_decay, n, 40, dtype, "float32"),
        **{"shape": x.shape, "dtype": "float32", "x": x, "base": base},
    )
    check(found, np.exp(-np.exp(x.astype(np.float64) + base[0])), "float32")
    found = webgpu.run(
        recurrent_rows.static_decay(5, 8, "float32"),
        x=base.reshape(5, 8),
        out=np.zeros((1, 40), np.float32),
    )["out"]
    check(found, np.exp(-np.exp(base[0].astype(np.float64))), "float32")


@pytest.mark.parametrize("is_group_norm", [False, True])
def test_gated_norms(webgpu: Any, dtype: str, n: int, is_group_norm: bool) -> None:
    x, gate = 2 * normal((n, 36)) + 1, normal((n, 36), dtype, 1)
    weight, bias = normal((2, 36 if is_group_norm else 12), seed=2)
    heads = x.astype(np.float64).reshape(n, 3, 12)
    if is_group_norm:
        heads = heads - heads.mean(-1, keepdims=True)
    heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-3)
    scaled = (heads.reshape(n, -1, len(weight)) * weight).reshape(n, 36)
    scaled = scaled + bias if is_group_norm else scaled
    found = run_rows(
        *(webgpu, recurrent_rows.gated_head_norm, n, 3, 12, dtype, "float32", 1e-3, is_group_norm),
        **{"shape": x.shape, "dtype": dtype, "x": x, "gate": gate, "weight": weight},
        **({"bias": bias} if is_group_norm else {}),
    )
    check(found, scaled * gate * sigmoid(gate), dtype)


def test_gates_between_heads(webgpu: Any, dtype: str, n: int) -> None:
    heads, size = 3, 10
    x, y = normal((n, 80), dtype), normal((n, 30), dtype, 1)  # one head of K and one of V
    gated = x[:, :60].reshape(n, heads, 2, size)
    kept = np.concatenate([gated[:, :, 0].reshape(n, -1), x[:, 60:]], axis=1)
    found = run_rows(
        *(webgpu, recurrent_rows.drop_gates, n, heads, 1, size, dtype),
        **{"shape": kept.shape, "dtype": dtype, "x": x},
    )
    np.testing.assert_array_equal(found, kept)
    found = run_rows(
        *(webgpu, recurrent_rows.sigmoid_mul, n, 30, size, 2 * size, size, 80, dtype),
        **{"shape": y.shape, "dtype": dtype, "x": y, "gate": x},
    )
    check(found, y * sigmoid(gated[:, :, 1].reshape(n, -1)), dtype)
