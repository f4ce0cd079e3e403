"""Kernels for GPUs, run as WGSL, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlc_llm.kernels.cpu.group_format import GroupFormat
from mlc_llm.kernels.cpu.query_scale import QueryScale
from mlc_llm.kernels.gpu import linear, rope, rows, sampling, sorting
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.encoded import GroupCodes
from mlc_llm.quantization.formats import pack_codes
from mlc_llm.quantization.group import dequantize_group, quantize_group
from mlc_llm.quantization.schemes import get_scheme

TOLERANCE = {"float32": 2e-5, "float16": 4e-3}
DTYPES = ["float32", "float16"]
# One row, as in decoding, is known when a kernel is made; many are not.
ROWS = [1, 5]


def known(n: int) -> int | None:
    return n if n == 1 else None


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture(params=DTYPES)
def dtype(request, webgpu) -> str:
    if request.param == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    return request.param


def check(webgpu: Any, kernel: Any, expected: np.ndarray, **tensors: np.ndarray) -> None:
    dtype = str(expected.dtype)
    found = webgpu.run(kernel, **tensors, out=np.zeros(expected.shape, dtype))["out"]
    wide = expected.astype(np.float64)
    tolerance = TOLERANCE.get(dtype, 0) * max(1.0, np.abs(wide).max())
    np.testing.assert_allclose(found.astype(np.float64), wide, atol=tolerance, rtol=0)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("n", ROWS)
def test_rms_norm(webgpu, dtype, n) -> None:
    x, weight = 3 * normal((n, 96), dtype), normal((96,), dtype, 1)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight
    kernel = rows.rms_norm(known(n), 96, 1e-5, dtype)
    check(webgpu, kernel, expected.astype(dtype), x=x, weight=weight)


@pytest.mark.parametrize("adds_one", [False, True])
def test_layer_norm(webgpu, dtype, adds_one) -> None:
    x, weight, bias = (normal((5, 96), dtype) + 2, *normal((2, 96), dtype, 1))
    x = x.astype(dtype)
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    expected = normed * (weight.astype(np.float64) + adds_one) + bias
    kernel = rows.layer_norm(None, 96, 1e-5, adds_one, dtype)
    check(webgpu, kernel, expected.astype(dtype), x=x, weight=weight, bias=bias)


@pytest.mark.parametrize(("part", "items"), [(16, 16), (16, 96), (96, 96)])
def test_norm_of_parts(webgpu, part, items) -> None:
    x, weight = normal((5, 96)), normal((items,), seed=1)
    parts = x.reshape(5, -1, part)
    normed = (parts / np.sqrt((parts**2).mean(2, keepdims=True) + 1e-6)).reshape(5, 96)
    expected = normed * np.tile(weight, 96 // items)
    check(
        webgpu,
        rows.norm_parts(None, 96, part, items, 1e-6, "float32"),
        expected,
        x=x,
        weight=weight,
    )


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(webgpu, kind) -> None:
    # Far out too, where powers are infinite.
    x = np.concatenate([4 * normal((4, 64)), [[-200.0, 200.0] * 32]]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[kind](x.astype(np.float64)).astype(np.float32)
    check(webgpu, rows.activate(None, 64, kind, "float32"), expected, x0=x)


@pytest.mark.parametrize("is_gate_first", [True, False])
def test_gated(webgpu, dtype, is_gate_first) -> None:
    x = normal((5, 128), dtype)
    gate, up = np.split(x.astype(np.float64), 2, axis=1)[:: 1 if is_gate_first else -1]
    expected = (ACTIVATIONS["silu"](gate) * up).astype(dtype)
    check(webgpu, rows.gated(None, 64, "silu", is_gate_first, dtype), expected, x0=x)


def test_bounded_gate_and_up(webgpu, dtype) -> None:
    x = 4 * normal((5, 128), dtype)
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    gate, up = np.minimum(gate, 2.5), np.clip(up, -2.5, 2.5)
    expected = gate / (1 + np.exp(-1.3 * gate)) * (up + 1)
    check(webgpu, rows.bounded_swiglu(None, 64, 1.3, 2.5, dtype), expected.astype(dtype), x0=x)


def test_queries_grow_with_positions(webgpu, dtype) -> None:
    x, positions = normal((5, 64), dtype), np.array([0, 7, 8, 63, 8191], np.int32)
    factor = 1 + 0.5 * np.log(1 + (positions + 1) // 8)
    expected = x.astype(np.float64)
    expected[:, :40] *= factor[:, None]
    kernel = rows.scale_queries(None, 64, 40, QueryScale(0.5, 8, 1), dtype)
    check(webgpu, kernel, expected.astype(dtype), x=x, positions=positions)


def test_rows_item_by_item(webgpu, dtype) -> None:
    x, y = normal((5, 64), dtype), normal((5, 64), dtype, 1)
    wide = x.astype(np.float64)
    check(webgpu, rows.add(None, 64, dtype), x + y, x0=x, x1=y)
    check(webgpu, rows.scale(None, 64, 8.5, dtype), (wide * 8.5).astype(dtype), x0=x)
    check(webgpu, rows.clip(None, 64, 0.5, dtype), np.clip(x, -0.5, 0.5).astype(dtype), x0=x)
    capped = (3 * np.tanh(wide / 3)).astype(dtype)
    check(webgpu, rows.soft_cap(None, 64, 3.0, dtype), capped, x0=x)
    check(webgpu, rows.columns(None, 64, 16, 8, dtype), x[:, 16:24], x0=x)
    joined = np.concatenate([x, y[:, :24]], axis=1)
    check(
        webgpu, rows.join(None, (64, 24), dtype), joined, x0=x, x1=np.ascontiguousarray(y[:, :24])
    )


def test_chosen_rows(webgpu, dtype) -> None:
    x, chosen = normal((7, 64), dtype), np.array([6, 0, 3], np.int32)
    check(webgpu, rows.take_rows(None, 64, dtype), x[chosen], x=x, chosen=chosen)
    check(webgpu, rows.last_row(64, dtype), x[-1:], x=x)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotation(webgpu, dtype, is_interleaved, rotary_dim) -> None:
    turned, kept, head_dim = 3, 1, 16
    half = rotary_dim // 2
    x = normal((4, (turned + kept) * head_dim), dtype)
    # The last position is one of a long text: the angle has to stay exact.
    positions = np.array([0, 1, 77, 100_000], np.int32)
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    expected = x.astype(np.float64).reshape(4, turned + kept, head_dim)
    part = expected[:, :turned, :rotary_dim]
    split = (
        (slice(0, None, 2), slice(1, None, 2))
        if is_interleaved
        else (
            slice(0, half),
            slice(half, None),
        )
    )
    first, second = part[..., split[0]].copy(), part[..., split[1]].copy()
    part[..., split[0]] = first * cos - second * sin
    part[..., split[1]] = second * cos + first * sin
    expected = (expected.reshape(x.shape)).astype(dtype)
    kernel = rope.rotate(None, (turned, kept, head_dim), rotary_dim, is_interleaved, 1.0, dtype)
    found = webgpu.run(
        kernel, x=x, positions=positions, frequencies=frequencies, out=np.zeros_like(x)
    )["out"]
    np.testing.assert_allclose(
        found.astype(np.float64),
        expected.astype(np.float64),
        atol=1e-3 if dtype == "float32" else 8e-3,
    )
    table = np.concatenate([cos[:, 0], sin[:, 0]], axis=1).astype(np.float32)
    heads = (turned, kept, head_dim)
    kernel = rope.rotate_by_table(None, heads, rotary_dim, is_interleaved, dtype)
    check(webgpu, kernel, expected, x=x, table=table)


@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_with_weights(webgpu, dtype, n, has_bias) -> None:
    x, weight, bias = normal((n, 64), dtype), normal((96, 64), dtype, 1), normal((96,), dtype, 2)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T + (bias if has_bias else 0)
    kernel = linear.matmul(known(n), 96, 64, dtype, dtype, has_bias)
    extra = {"bias": bias} if has_bias else {}
    check(webgpu, kernel, expected.astype(dtype), x=x, weight=weight, **extra)


@pytest.mark.parametrize("n", [1, 7, 70])
@pytest.mark.parametrize("name", ["q4f32_1", "q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1"])
def test_product_with_quantized_weights(webgpu, name, n) -> None:
    scheme = get_scheme(name)
    if scheme.dtype == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    form = group_format(scheme, is_linear=True)
    # A last group that is not full.
    width = form.group_size * 3 - 8
    weight = normal((96, width), seed=1)
    words, scales = quantize_group(weight, scheme, transpose=form.is_transposed)
    stored = dequantize_group(words, scales, scheme, width, transposed=form.is_transposed)
    x = normal((n, width), scheme.dtype)
    expected = (x.astype(np.float64) @ stored.astype(np.float64).T).astype(scheme.dtype)
    kernel = linear.group_matmul(known(n), 96, width, form, scheme.dtype, False)
    check(webgpu, kernel, expected, x=x, words=words, scales=scales)


@pytest.mark.parametrize("n", [1, 7, 70])
@pytest.mark.parametrize(
    ("bits", "group_size", "zero"),
    [(4, 32, 8), (4, 32, None), (5, 32, 16), (5, 32, None), (6, 16, 32), (8, 32, 128)],
)
def test_product_with_the_codes_of_a_file(webgpu, bits, group_size, zero, n) -> None:
    """Codes as GGUF files have them: in two planes, around a zero or above a minimum."""
    if not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    form = GroupFormat(bits, group_size, "float16", False, zero, has_minimum=zero is None)
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (96, 128), np.uint8)
    scale, minimum = (normal((96, 128 // group_size), seed=i) * 0.1 for i in (1, 2))
    kept = GroupCodes(codes, scale, zero or 0, minimum if zero is None else None)
    words, scales = pack_codes([kept], form)
    wide = np.repeat(scale.astype(np.float16).astype(np.float64), group_size, axis=1)
    stored = (codes.astype(np.float64) - (zero or 0)) * wide
    if zero is None:
        stored += np.repeat(minimum.astype(np.float16).astype(np.float64), group_size, axis=1)
    x = normal((n, 128), "float16")
    expected = (x.astype(np.float64) @ stored.astype(np.float16).astype(np.float64).T).astype("f2")
    kernel = linear.group_matmul(known(n), 96, 128, form, "float16", False)
    check(webgpu, kernel, expected, x=x, words=words, scales=scales)


@pytest.mark.parametrize("n", ROWS)
def test_tables(webgpu, n) -> None:
    table = normal((50, 64))
    ids = np.arange(0, 50, 11, dtype=np.int32)[:n]
    check(webgpu, linear.embed(known(n), 50, 64, "float32"), table[ids], ids=ids, table=table)
    scheme = get_scheme("q4f32_1")
    words, scales = quantize_group(table, scheme, transpose=False)
    stored = dequantize_group(words, scales, scheme, 64, transposed=False)
    kernel = linear.group_embed(known(n), 50, 64, group_format(scheme, is_linear=False))
    check(webgpu, kernel, stored[ids].astype(np.float32), ids=ids, words=words, scales=scales)


def test_logit_bias(webgpu) -> None:
    logits = normal((2, 700))
    row, tokens = np.array([0, 1, 1], np.int32), np.array([3, 3, 699], np.int32)
    bias = np.array([1.5, -100, 7], np.float32)
    expected = logits.copy()
    expected[row, tokens] += bias
    found = webgpu.run(
        sampling.apply_logit_bias(), logits=logits, rows=row, tokens=tokens, bias=bias
    )["logits"]
    np.testing.assert_array_equal(found, expected)


def test_penalties(webgpu) -> None:
    logits = normal((3, 700))
    row = np.array([2, 0], np.int32)  # the second sequence's logits are in row 0
    sequence = np.array([0, 0, 1], np.int32)
    tokens, counts = np.array([5, 9, 5], np.int32), np.array([1, 4, 2], np.int32)
    penalties = np.array([[0.5, 0.25, 1.2], [0, 0, 1.5]], np.float32)
    expected = logits.copy()
    for s, token, count in zip(sequence, tokens, counts, strict=True):
        presence, frequency, repetition = penalties[s]
        value = expected[row[s], token] - presence - count * frequency
        expected[row[s], token] = value / repetition if value > 0 else value * repetition
    found = webgpu.run(
        sampling.apply_penalty(),
        logits=logits,
        rows=row,
        sequence_of=sequence,
        tokens=tokens,
        counts=counts,
        penalties=penalties,
    )["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bitmask(webgpu) -> None:
    logits, rng = normal((2, 700)), np.random.default_rng(1)
    allowed = rng.random((1, 704)) < 0.5
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    found = webgpu.run(
        sampling.apply_bitmask(), logits=logits, rows=np.array([1], np.int32), mask=mask
    )["logits"]
    expected = logits.copy()
    expected[1, ~allowed[0, :700]] = np.float32(-3.402823e38)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-6])
def test_softmax(webgpu, temperature) -> None:
    logits = 5 * normal((2, 1, 700))
    heat = np.array([temperature, 2 * temperature], np.float32)
    scaled = (logits.astype(np.float64) - logits.max(2, keepdims=True)) / heat[:, None, None]
    expected = (np.exp(scaled) / np.exp(scaled).sum(2, keepdims=True)).astype(np.float32)
    check(webgpu, sampling.softmax_with_temperature(), expected, logits=logits, temperature=heat)


@pytest.mark.parametrize("width", [100, 256, 1000])
def test_sorting(webgpu, width) -> None:
    # Many are equal, and those keep their order.
    probs = np.random.default_rng(0).integers(0, 40, (3, width)).astype(np.float32)
    expected = np.argsort(-probs, axis=1, kind="stable")
    shapes = {"out": np.zeros_like(probs), "order": np.zeros(probs.shape, np.int32)}
    found = webgpu.run(sorting.sort_runs(width), x=probs, **shapes)
    run = sorting.RUN
    while run < width:
        found = webgpu.run(
            sorting.merge_runs(width, run),
            x=found["out"],
            order=found["order"],
            out=shapes["out"],
            merged=shapes["order"],
        )
        found, run = {"out": found["out"], "order": found["merged"]}, 2 * run
    np.testing.assert_array_equal(found["order"], expected)
    np.testing.assert_array_equal(found["out"], np.take_along_axis(probs, expected, 1))


def draw(probs: np.ndarray, top_p: float, uniform: float) -> int:
    """Return the place of the token that is chosen among falling probabilities."""
    sums = np.cumsum(probs, dtype=np.float64)
    count = int(np.searchsorted(sums, top_p)) + 1
    return int(np.searchsorted(sums[:count], uniform * sums[min(count, len(sums)) - 1], "right"))


@pytest.mark.parametrize("width", [8, 700])
@pytest.mark.parametrize("top_p", [1e-5, 0.5, 0.9, 1.0])
def test_draws(webgpu, width, top_p) -> None:
    rng = np.random.default_rng(width)
    probs = -np.sort(-rng.dirichlet(np.ones(width), 2), axis=1).astype(np.float32)
    order = np.stack([rng.permutation(width), rng.permutation(width)]).astype(np.int32)
    uniform = np.array([0.0, 0.1, 0.37, 0.5, 0.83, 0.999], np.float32)
    row = np.array([0, 1, 0, 1, 0, 1], np.int32)
    found = webgpu.run(
        sampling.sample_with_top_p(),
        probs=probs,
        order=order,
        uniform=uniform,
        rows=row,
        top_p=np.full(2, top_p, np.float32),
        out=np.zeros(6, np.int32),
    )["out"]
    expected = [order[r, draw(probs[r], top_p, u)] for r, u in zip(row, uniform, strict=True)]
    np.testing.assert_array_equal(found, expected)
