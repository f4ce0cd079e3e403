"""Rotary embedding and the page layout against NumPy."""

import numpy as np
import pytest

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import rope
from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.runtime.memory import aligned_zeros

pytestmark = pytest.mark.cpu

PAGE = 16


def rotate(x, angles):
    """Rotate x (n, h, d) by angles (n, r / 2); dimensions from r on stay."""
    half = angles.shape[1]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


@pytest.mark.parametrize(("rotary_dim", "scale"), [(16, 1.0), (10, 0.5)])
def test_table(build, rotary_dim, scale):
    kernel = build(rope.rope_table(rotary_dim, scale))
    frequencies = (10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
    for positions in ([0], [3, 1, 200, 100_000]):
        index = np.asarray(positions, np.int32)
        # Angles are rounded to float32, as every implementation does.
        angles = index[:, None].astype(np.float32) * frequencies
        expected = scale * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        found = kernel(index, frequencies, shape=(len(positions), rotary_dim))
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "kv_dtype"),
    [(4, 2, 16, 16, "float32"), (3, 1, 20, 20, "float16"), (2, 2, 24, 10, "float32")],
)
@pytest.mark.parametrize("n", [1, 21])
def test_rotate_and_write(build, rng, heads, kv_heads, head_dim, rotary_dim, kv_dtype, n):
    shape = AttentionShape(heads, kv_heads, head_dim, PAGE, kv_dtype, 1.0, -1)
    kernel = build(rope.rope_and_write(shape, rotary_dim))
    width = (heads + 2 * kv_heads) * head_dim
    qkv = rng.standard_normal((n, width)).astype(np.float32)
    angles = rng.uniform(-7, 7, (n, rotary_dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    slots = rng.permutation(4 * PAGE)[:n].astype(np.int32)
    pages = aligned_zeros((4, 2, kv_heads, PAGE * head_dim), numpy_dtype(kv_dtype))
    pages[...] = 7
    q = kernel(qkv, table, slots, pages, shape=(n, heads, head_dim))

    parts = qkv.reshape(n, heads + 2 * kv_heads, head_dim)
    np.testing.assert_allclose(q, rotate(parts[:, :heads], angles), atol=2e-6)
    expected = np.full(pages.shape, 7, np.float64)
    keys = expected[:, 0].reshape(4, kv_heads, head_dim, PAGE)
    values = expected[:, 1].reshape(4, kv_heads, PAGE, head_dim)
    assert np.shares_memory(keys, expected) and np.shares_memory(values, expected)
    page, offset = slots // PAGE, slots % PAGE
    keys[page, :, :, offset] = rotate(parts[:, heads : heads + kv_heads], angles)
    values[page, :, offset] = parts[:, heads + kv_heads :]
    tolerance = 1e-3 if kv_dtype == "float16" else 1e-6
    np.testing.assert_allclose(pages.astype(np.float64), expected, rtol=tolerance, atol=2e-6)


def test_int8_pages_hold_codes_and_scales(build, rng):
    shape = AttentionShape(2, 2, 12, PAGE, "int8", 1.0, -1)
    kernel = build(rope.rope_and_write(shape, 12))
    n = 5
    qkv = rng.standard_normal((n, 6 * 12)).astype(np.float32)
    qkv[3] = 0
    table = np.concatenate([np.ones((n, 6)), np.zeros((n, 6))], axis=1).astype(np.float32)
    slots = np.asarray([3, 17, 31, 0, 15], np.int32)
    pages = aligned_zeros((2, 2, 2, shape.page_items), np.int8)
    kernel(qkv, table, slots, pages, shape=(n, 2, 12))
    codes = pages[..., : PAGE * 12]
    scales = np.ascontiguousarray(pages[..., PAGE * 12 :]).view(np.float32)
    parts = qkv.reshape(n, 6, 12)
    for token, slot in enumerate(slots):
        page, offset = divmod(int(slot), PAGE)
        for head in range(2):
            stored = (
                codes[page, 0, head].reshape(12, PAGE)[:, offset],
                codes[page, 1, head].reshape(PAGE, 12)[offset],
            )
            for side, row in enumerate((parts[token, 2 + head], parts[token, 4 + head])):
                scale = np.abs(row).max() / np.float32(127)
                np.testing.assert_allclose(scales[page, side, head, offset], scale, rtol=1e-6)
                restored = stored[side].astype(np.float32) * scales[page, side, head, offset]
                assert np.abs(restored - row).max() <= 0.5001 * scale
