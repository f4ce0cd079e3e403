"""Mixtures of experts on a GPU: what transformers computed, and what a CPU computes."""

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
PARTS = [(40,), (7, 2, 30, 1)]


def logits_of(runner: ModelRunner, tokens: list[int], parts: tuple[int, ...]) -> np.ndarray:
    """Return logits of all tokens, `parts` of them a step, the rest in the last one."""
    sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
    ends = [*np.cumsum(parts)[:-1], len(tokens)]
    starts = [0, *ends[:-1]]
    found = [
        run_step(runner, [(sequence, tokens[a:b])])[0] for a, b in zip(starts, ends, strict=True)
    ]
    return np.concatenate(found)


# Shared experts; biases and bounds; sigmoids, weights before the product, and one expert a token.
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4_text"])
def test_logits_equal_the_reference(tiny_models: TinyModels, name: str) -> None:
    reference = get_case(name).load()
    tokens = reference.token_ids.tolist()
    with closing(tiny_models.gpu_runner(name, "q0f32", find_gpu())) as runner:
        for parts in PARTS:
            assert relative_error(logits_of(runner, tokens, parts), reference.logits) < 1e-4


def test_quantized_is_what_a_cpu_computes(tiny_models: TinyModels) -> None:
    tokens = get_case("mixtral").load().token_ids.tolist()
    expected = logits_of(tiny_models.runner("mixtral", "q4f32_1"), tokens, (len(tokens),))
    with closing(tiny_models.gpu_runner("mixtral", "q4f32_1", find_gpu())) as runner:
        for parts in (*PARTS, (1,) * len(tokens)):
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
