"""Rows around recurrences against NumPy, with widths that no vector divides."""

from __future__ import annotations

import numpy as np
import pytest

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import recurrent_rows

pytestmark = pytest.mark.cpu

ROWS = [1, 5, 37]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lerp(build, rng, dtype):
    kernel = build(recurrent_rows.lerp(36, dtype))
    weight = rng.uniform(0, 1, (1, 1, 36)).astype(numpy_dtype(dtype))
    for n in ROWS:
        x, y = normal(rng, n, 36), normal(rng, n, 36)
        expected = x + (y - x) * weight[0].astype(np.float64)
        np.testing.assert_allclose(kernel(x, y, weight, shape=x.shape), expected, 1e-5, 1e-6)


@pytest.mark.parametrize("part", [0, 2])
def test_low_rank_lerp(build, rng, part):
    kernel = build(recurrent_rows.low_rank_lerp(36, 7, 3, part, "float16"))
    up = normal(rng, 3, 7, 36).astype(np.float16)
    base = normal(rng, 1, 1, 36).astype(np.float16)
    for n in ROWS:
        x, y, low = normal(rng, n, 36), normal(rng, n, 36), normal(rng, n, 21)
        weight = base[0].astype(np.float64) + low[:, part * 7 : part * 7 + 7] @ up[part].astype(
            np.float64
        )
        found = kernel(x, y, low, up, base, shape=x.shape)
        np.testing.assert_allclose(found, x + (y - x) * weight, 1e-4, 1e-4)


def test_tanh(build):
    kernel = build(recurrent_rows.tanh(20))
    x = np.concatenate([np.linspace(-6, 6, 36), [-1e30, -100, 100, 1e30]]).astype(np.float32)
    found = kernel(x.reshape(2, 20), shape=(2, 20)).ravel()
    np.testing.assert_allclose(found, np.tanh(x.astype(np.float64)), rtol=0, atol=3e-7)


def test_decays(build, rng):
    raw = rng.uniform(-8, 2, (3, 12)).astype(np.float32)
    expected = np.exp(-np.exp(raw.astype(np.float64)))
    found = build(recurrent_rows.static_decay(3, 12, "float32"))(raw, shape=(1, 36))
    np.testing.assert_allclose(found, expected.reshape(1, 36), rtol=2e-6)
    base = rng.uniform(-8, 2, (1, 1, 36)).astype(np.float32)
    x = normal(rng, 5, 36)
    found = build(recurrent_rows.dynamic_decay(36, "float32"))(x, base, shape=x.shape)
    total = x.astype(np.float64) + base[0]
    np.testing.assert_allclose(found, np.exp(-np.exp(total)), rtol=5e-6, atol=1e-30)
    assert (found <= 1).all()


def test_gated_group_norm(build, rng):
    kernel = build(recurrent_rows.gated_head_norm(3, 12, "float32", 1e-3, True))
    weight, bias = normal(rng, 36), normal(rng, 36)
    for n in ROWS:
        x, gate = 2 * normal(rng, n, 36) + 1, normal(rng, n, 36)
        heads = x.astype(np.float64).reshape(n, 3, 12)
        centered = heads - heads.mean(-1, keepdims=True)
        normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
        expected = (normed.reshape(n, 36) * weight + bias) * gate * sigmoid(gate)
        found = kernel(x, gate, weight, bias, shape=x.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gated_rms_norm(build, rng):
    kernel = build(recurrent_rows.gated_head_norm(3, 12, "float16", 1e-3, False))
    weight = normal(rng, 12).astype(np.float16)
    for n in ROWS:
        x, gate = normal(rng, n, 36), normal(rng, n, 36)
        heads = x.astype(np.float64).reshape(n, 3, 12)
        normed = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-3)
        expected = (normed * weight.astype(np.float64)).reshape(n, 36) * gate * sigmoid(gate)
        found = kernel(x, gate, weight, np.zeros(12, np.float16), shape=x.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gates_between_heads(build, rng):
    heads, kv_heads, size = 3, 1, 10
    x = normal(rng, 5, (2 * heads + 2 * kv_heads) * size)
    gated = x[:, : 2 * heads * size].reshape(5, heads, 2, size)
    rest = x[:, 2 * heads * size :]
    drop = build(recurrent_rows.drop_gates(heads, kv_heads, size))
    expected = np.concatenate([gated[:, :, 0].reshape(5, -1), rest], axis=1)
    np.testing.assert_array_equal(drop(x, shape=expected.shape), expected)
    y = normal(rng, 5, heads * size)
    gate = build(recurrent_rows.sigmoid_mul(heads, size, 2 * size, size, x.shape[1]))
    expected = y * sigmoid(gated[:, :, 1].reshape(5, -1))
    np.testing.assert_allclose(gate(y, x, shape=y.shape), expected, rtol=2e-6, atol=1e-7)
