"""Mixtures of experts, and latent attention, on a GPU: what transformers, or a CPU, computed."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from gpu_device import find_gpu
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import NUM_PAGES, PAGE_SIZE, TinyModels, relative_error, run_step

from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.runner import ModelRunner

pytestmark = pytest.mark.cpu

# Tokens of a step in parts: experts get pairs in tiles, or one by one.
PARTS = (7, 2, 30, 1)


def logits_of(runner: ModelRunner, tokens: list[int], parts: tuple[int, ...]) -> np.ndarray:
    """Return logits of all tokens, `parts` of them a step."""
    assert sum(parts) == len(tokens)
    sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
    ends = np.cumsum(parts)
    found = [
        run_step(runner, [(sequence, tokens[end - count : end])])[0]
        for end, count in zip(ends, parts, strict=True)
    ]
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt_oss", (9, 2, 30)),  # with biases and bounds
        ("deepseek_v2", PARTS),  # latent attention, groups of experts, shared ones
    ],
)
def test_logits_equal_the_reference(
    tiny_models: TinyModels, name: str, parts: tuple[int, ...]
) -> None:
    reference = get_case(name).load()
    tokens = reference.token_ids.tolist()
    with closing(tiny_models.gpu_runner(name, "q0f32", find_gpu())) as runner:
        for tried in ((len(tokens),), parts):
            assert relative_error(logits_of(runner, tokens, tried), reference.logits) < 1e-4


def test_quantized_is_what_a_cpu_computes(tiny_models: TinyModels) -> None:
    tokens = get_case("mixtral").load().token_ids.tolist()
    expected = logits_of(tiny_models.runner("mixtral", "q4f32_1"), tokens, (len(tokens),))
    with closing(tiny_models.gpu_runner("mixtral", "q4f32_1", find_gpu())) as runner:
        for parts in ((len(tokens),), (7, 2, 31)):
            assert relative_error(logits_of(runner, tokens, parts), expected) < 1e-4
        # Tokens of others beside them change nothing.
        pool = PagePool(NUM_PAGES, PAGE_SIZE)
        sequences = [PagedSequence(pool) for _ in range(3)]
        lengths = (5, 1, 9)
        for step in range(2):
            work = [
                (sequence, tokens[: lengths[i]] if step == 0 else [tokens[lengths[i]]])
                for i, sequence in enumerate(sequences)
            ]
            for (sequence, part), found in zip(work, run_step(runner, work), strict=True):
                end = len(sequence.token_ids)
                assert relative_error(found, expected[end - len(part) : end]) < 1e-4
