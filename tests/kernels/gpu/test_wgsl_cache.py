"""Attention kernels of TVM's paged cache in a model's library, run as WGSL, against NumPy.

Not run: those of trees, which only draft models of other engines ask for, and copies of pages,
which `web-llm` asks for when it forks sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_kernels import kernels_of, with_numbers
from wgsl import Device

pytestmark = pytest.mark.cpu

PAGE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 8  # of the model, and of TVM's pages
SCALE = 0.4
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}
# Keys that sequences have: less than a page, some pages, and one more than whole pages.
LENGTHS = (5, 41, 33)
# What is left of them in a window: first tokens that are kept, and where the others begin.
SINKS, STARTS = (0, 3, 2), (0, 20, 18)
NUMBERS = {"causal": 1, "rotary_mode": 0, "rope_scale": 1, "rope_theta": 1, "sm_scale": SCALE}


@pytest.fixture(scope="module", params=["float32", "float16"])
def dtype(request: Any, webgpu: Device) -> str:
    if request.param == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    return str(request.param)


@pytest.fixture(scope="module")
def kernels(dtype: str) -> dict[str, Any]:
    return kernels_of("llama_gqa", {"float32": "q0f32", "float16": "q0f16"}[dtype])


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def starts_of(lengths: Any) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, is_causal: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return what tokens see, and base-2 logarithms of the sums of weights.

    q: (n, heads, dim); k, v: (m, KV heads, dim). Causal: the tokens are the last ones of the keys.
    """
    group, (n, m) = HEADS // KV_HEADS, (len(q), len(k))
    wide_k, wide_v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("nhd,mhd->nhm", q.astype(np.float64), wide_k) * SCALE
    is_later = np.arange(m) > m - n + np.arange(n)[:, None]
    scores[np.broadcast_to(is_causal & is_later[:, None], scores.shape)] = -np.inf
    weights = np.exp(scores)
    sums = weights.sum(2)
    return np.einsum("nhm,mhd->nhd", weights / sums[..., None], wide_v), np.log2(sums)


def attend_all(
    queries: list[np.ndarray], keys: Any, is_causal: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    parts = [attend(q, *kv, is_causal) for q, kv in zip(queries, keys, strict=True)]
    output, sums = zip(*parts, strict=True)
    return np.concatenate(output), np.concatenate(sums)


def check(found: dict[str, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for name, value in zip(("output", "lse"), expected, strict=True):
        tolerance = TOLERANCE[str(found["output"].dtype)] * max(1.0, np.abs(value).max())
        np.testing.assert_allclose(found[name].astype(np.float64), value, rtol=0, atol=tolerance)


class Paged:
    """Keys and values of sequences in pages that lie in no order."""

    def __init__(self, dtype: str, is_windowed: bool) -> None:
        counts = [-(-length // PAGE) for length in LENGTHS]
        order = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
        self.pages = normal(1, (len(order), 2, KV_HEADS, PAGE, HEAD_DIM), dtype)
        self.indptr, self.values = starts_of(counts), order
        last = [length - (count - 1) * PAGE for length, count in zip(LENGTHS, counts, strict=True)]
        rows = [last, STARTS, SINKS] if is_windowed else last
        self.length_info = np.array(rows, np.int32)
        self.keys = []
        for i, length in enumerate(LENGTHS):
            own = self.pages[order[self.indptr[i] : self.indptr[i + 1]]]
            flat = own.transpose(1, 0, 3, 2, 4).reshape(2, -1, KV_HEADS, HEAD_DIM)[:, :length]
            if is_windowed:
                flat = np.concatenate([flat[:, : SINKS[i]], flat[:, STARTS[i] :]], axis=1)
            self.keys.append(flat)


@pytest.mark.parametrize("is_windowed", [False, True])
def test_decoding(webgpu: Device, kernels: Any, dtype: str, is_windowed: bool) -> None:
    name = "batch_decode_paged_kv" + "_sliding_window" * is_windowed
    paged, q = Paged(dtype, is_windowed), normal(2, (len(LENGTHS), HEADS, HEAD_DIM), dtype)
    found = webgpu.run(
        with_numbers(kernels[name], **NUMBERS),
        Q=q,
        pages=paged.pages,
        page_table_indptr=paged.indptr,
        page_table_values=paged.values,
        length_info=paged.length_info,
        k_rope_pos_offset=np.zeros(len(LENGTHS), np.int32),
        q_rope_position=np.zeros(len(LENGTHS), np.int32),
        output=np.zeros_like(q),
        lse=np.zeros((len(q), HEADS), np.float32),
    )
    check(found, attend_all(np.split(q, len(q)), paged.keys))


@pytest.mark.parametrize("is_windowed", [False, True])
def test_prompts_after_what_is_cached(
    webgpu: Device, kernels: Any, dtype: str, is_windowed: bool
) -> None:
    name = "batch_prefill_paged_kv" + "_sliding_window" * is_windowed
    paged, counts = Paged(dtype, is_windowed), (4, 7, 1)
    q = normal(3, (sum(counts), HEADS, HEAD_DIM), dtype)
    found = webgpu.run(
        with_numbers(kernels[name], **NUMBERS),
        q=q,
        q_indptr=starts_of(counts),
        pages=paged.pages,
        page_indptr=paged.indptr,
        page_values=paged.values,
        length_info=paged.length_info,
        k_rope_pos_offset=np.zeros(len(LENGTHS), np.int32),
        q_rope_position=np.zeros(len(q), np.int32),
        output=np.zeros_like(q),
        lse=np.zeros((len(q), HEADS), np.float32),
    )
    # With a window, the new tokens' own keys are apart, and those in pages are all before them.
    queries = np.split(q, np.cumsum(counts)[:-1])
    check(found, attend_all(queries, paged.keys, is_causal=not is_windowed))


def test_prompts_among_themselves(webgpu: Device, kernels: Any, dtype: str) -> None:
    q = normal(4, (sum(LENGTHS), HEADS, HEAD_DIM), dtype)
    k, v = normal(5, (2, sum(LENGTHS), KV_HEADS, HEAD_DIM), dtype)
    starts = starts_of(LENGTHS)
    found = webgpu.run(
        with_numbers(kernels["batch_prefill_ragged_kv"], **NUMBERS),
        q=q,
        q_indptr=starts,
        k=k,
        v=v,
        kv_indptr=starts,
        q_rope_position=np.zeros(len(q), np.int32),
        k_rope_pos_offset=np.zeros(len(LENGTHS), np.int32),
        output=np.zeros_like(q),
        lse=np.zeros((len(q), HEADS), np.float32),
    )
    split = [np.split(x, starts[1:-1]) for x in (q, k, v)]
    check(found, attend_all(split[0], zip(split[1], split[2], strict=True)))


def test_parts_of_the_keys_are_merged(webgpu: Device, kernels: Any, dtype: str) -> None:
    q = normal(6, (1, HEADS, HEAD_DIM), dtype)
    k, v = normal(7, (2, 30, KV_HEADS, HEAD_DIM), dtype)
    (first, first_sum), (other, other_sum) = attend(q, k[:11], v[:11]), attend(q, k[11:], v[11:])
    found = webgpu.run(
        kernels["tir_attention_merge_state"],
        V=first.astype(dtype),
        S=first_sum.astype(np.float32),
        V_other=other.astype(dtype),
        S_other=other_sum.astype(np.float32),
    )
    check({"output": found["V"], "lse": found["S"]}, attend(q, k, v))
