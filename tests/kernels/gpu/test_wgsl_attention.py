"""Attention over pages on GPUs, run as WGSL, against a dense softmax in NumPy."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from attention_steps import PAGE, RAGGED, Step
from wgsl import translate

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu.attention import paged_attention
from mlc_llm.kernels.gpu.attention_pages import copy_pages, rope_and_write, write
from mlc_llm.kernels.gpu.attention_scores import BlockLimits
from mlc_llm.kernels.gpu.attention_tile import tile_grid
from mlc_llm.kernels.gpu.rope import rope_table

TOLERANCE = {"float32": 2e-5, "float16": 4e-3}
# What WebGPU grants for certain.
LIMITS = BlockLimits(max_parts=4)

GQA = AttentionShape(8, 2, 16, PAGE, "float32", 0.25, -1)
SHAPES = {
    "groups of 4": GQA,
    "groups of 3, float16, window longer than a block": AttentionShape(
        3, 1, 64, PAGE, "float16", 0.125, 70
    ),
    "no groups, float16, soft cap": AttentionShape(2, 2, 80, PAGE, "float16", 0.1, -1, soft_cap=3),
    "groups of 8, wide heads": AttentionShape(8, 1, 128, PAGE, "float32", 0.09, -1),
    "float32 beside float16 pages, alibi": AttentionShape(
        6, 3, 32, PAGE, "float16", 0.2, -1, alibi=True
    ),
    "groups larger than a block, sinks over blocks": AttentionShape(
        36, 1, 8, PAGE, "float32", 0.25, 3, sinks=67
    ),
    "odd sizes, chunks": AttentionShape(2, 2, 6, PAGE, "float32", 0.4, 24, is_chunked=True),
}
# Up to 128 keys are one part, up to 512 are parts of 128, then four parts grow.
SINGLE = [(length, 1) for length in (1, 16, 17, 65, 127, 128, 129, 300, 700)]


def run(webgpu: Any, step: Step, sink_logits: np.ndarray | None = None) -> np.ndarray:
    sink_dtype = None if sink_logits is None else str(sink_logits.dtype)
    kernel = paged_attention(step.shape, step.dtype, sink_dtype, LIMITS)
    found: np.ndarray = webgpu.run(kernel, **step.tensors(LIMITS.max_parts, sink_logits))["out"]
    return found.reshape(step.q.shape)


def check(webgpu: Any, step: Step, sink_logits: np.ndarray | None = None) -> None:
    found, expected = run(webgpu, step, sink_logits), step.expected(sink_logits)
    np.testing.assert_allclose(
        found.astype(np.float64), expected, atol=TOLERANCE[step.dtype], rtol=TOLERANCE[step.dtype]
    )


@pytest.fixture(params=SHAPES)
def shape(request, webgpu) -> tuple[AttentionShape, str]:
    """A shape, and what rows of queries are made of."""
    shape = SHAPES[request.param]
    if shape.kv_dtype == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    return shape, "float32" if "float32 beside" in request.param else shape.kv_dtype


@pytest.mark.parametrize("work", [RAGGED, SINGLE], ids=["ragged", "single"])
def test_attention(webgpu, shape, work) -> None:
    check(webgpu, Step(shape[0], work, shape[1]))


@pytest.mark.parametrize("work", [RAGGED, SINGLE], ids=["ragged", "single"])
def test_sink_logits_and_first_tokens(webgpu, work) -> None:
    # Some take nothing, some everything.
    logits = np.array([-200, 3, 200, 0, -1, 2, 1, 5], np.float32)
    check(webgpu, Step(dataclasses.replace(GQA, window=24, sinks=4), work, "float32"), logits)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "float16"), (128, "float16"), (256, "float32")]
)
def test_blocks_fit_in_shared_memory(head_dim, dtype) -> None:
    shape = AttentionShape(8, 1, head_dim, PAGE, dtype, 1.0, -1)
    launches = translate(
        paged_attention(shape, dtype, None, LIMITS),
        {
            **{"q": (3, 8, head_dim), "pages": (9, 2, 1, PAGE * head_dim), "query_start": (3,)},
            **{"page_table": (2, 5), "positions": (3,), "out": (3, 8 * head_dim)},
            "scratch": (2, 8, LIMITS.max_parts, head_dim + 2),
        },
    )
    for launch in launches:
        arrays = re.findall(
            r"var<workgroup> \w+ : array<(?:vec(\d)<)?f(\d+)>?, (\d+)>", launch.source
        )
        assert arrays
        sizes = [int(lanes or 1) * int(bits) // 8 * int(n) for lanes, bits, n in arrays]
        assert sum(sizes) <= 16384, (launch.name, arrays)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="heads of 1024 items do not fit in the 16 KiB"):
        tile_grid(AttentionShape(8, 1, 1024, PAGE, "float32", 1.0, -1), "float32", LIMITS)


def test_tokens_do_not_depend_on_what_is_beside_them(webgpu) -> None:
    whole = Step(dataclasses.replace(GQA, window=50, sinks=3), [(340, 41)], "float32")
    together = run(webgpu, whole)
    # The same tokens in pieces, a last one alone, beside others; the first token is left away.
    pieces = [(1, 7), (7, 8), (8, 33), (33, 41)]
    part = copy.copy(whole)
    part.query_start = np.array([0, *(end - 1 for _, end in pieces)], np.int32)
    part.page_table = np.repeat(whole.page_table, len(pieces), axis=0)
    part.positions, part.q = whole.positions[1:], whole.q[1:]
    part.work = [(299 + end, end - begin) for begin, end in pieces]
    np.testing.assert_array_equal(run(webgpu, part), together[1:])


def rotated(heads: np.ndarray, table: np.ndarray, is_interleaved: bool) -> np.ndarray:
    """Return heads (n, h, d) with the first items turned; table (n, rotary_dim)."""
    half = table.shape[1] // 2
    first, second = slice(0, half), slice(half, 2 * half)
    if is_interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    cos, sin = np.split(table.astype(np.float64)[:, None], 2, axis=2)
    out = heads.copy()
    out[..., first] = heads[..., first] * cos - heads[..., second] * sin
    out[..., second] = heads[..., second] * cos + heads[..., first] * sin
    return out


@pytest.mark.parametrize("kind", ["halves", "interleaved", "none"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
def test_rotation_and_write(webgpu, kind, kv_dtype) -> None:
    if kv_dtype == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    rng = np.random.default_rng(3)
    shape = AttentionShape(6, 2, 32, PAGE, kv_dtype, 1.0, -1)
    dtype, n, rotary_dim = kv_dtype, 5, 24
    qkv = rng.standard_normal((n, 10 * 32)).astype(dtype)
    slots = np.array([0, 47, 31, 32, 16], np.int32)
    pages = rng.standard_normal((3, 2, 2, PAGE * 32)).astype(kv_dtype)
    tensors = {"qkv": qkv, "slots": slots, "pages": pages, "q": np.zeros((n, 6, 32), dtype)}
    heads = qkv.reshape(n, 10, 32).astype(np.float64)
    if kind == "none":
        kernel = write(shape, dtype)
    else:
        table = rng.uniform(-1, 1, (n, rotary_dim)).astype(np.float32)
        tensors["table"] = table
        kernel = rope_and_write(shape, rotary_dim, kind == "interleaved", dtype)
        heads[:, :8] = rotated(heads[:, :8], table, kind == "interleaved")
    found = webgpu.run(kernel, **tensors)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(found["q"].astype(np.float64), heads[:, :6], atol=tolerance)
    expected = pages.reshape(3, 2, 2, PAGE, 32).astype(np.float64)
    expected[slots // PAGE, :, :, slots % PAGE] = heads[:, 6:].reshape(n, 2, 2, 32)
    np.testing.assert_allclose(found["pages"], expected.reshape(pages.shape), atol=tolerance)


def test_table_of_angles(webgpu) -> None:
    # The last position is one of a long text: the angle has to stay exact.
    positions = np.array([0, 1, 77, 100_000], np.int32)
    frequencies = (10000.0 ** (-np.arange(8) / 8)).astype(np.float32)
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    found = webgpu.run(
        rope_table(None, 16, 1.25),
        positions=positions,
        frequencies=frequencies,
        out=np.zeros((4, 16), np.float32),
    )["out"]
    expected = 1.25 * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_copies_of_pages(webgpu) -> None:
    pages = np.arange(6 * 2 * 3 * PAGE * 8, dtype=np.float32).reshape(6, 2, 3, PAGE * 8)
    sources, targets = np.array([5, 0, 5], np.int32), np.array([1, 2, 4], np.int32)
    found = webgpu.run(
        copy_pages(3, PAGE * 8, "float32"), pages=pages, sources=sources, targets=targets
    )["pages"]
    expected = pages.copy()
    expected[targets] = pages[sources]
    np.testing.assert_array_equal(found, expected)
