"""Results of steps are of many sizes; what is kept of them is bounded."""

from __future__ import annotations

from typing import Any

import pytest

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.runtime import model

pytestmark = pytest.mark.cpu


def score(runner: Any, length: int) -> list[float]:
    """Return the log-probabilities of a prompt, whose step has as many rows as tokens."""
    engine = Engine(runner, has_prefix_cache=False)
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.add(Request("scored", range(3, 3 + length), params, prompt_logprobs=0))
    outputs = engine.step()
    assert outputs[0].error is None and outputs[0].prompt_logprobs is not None
    return [entry.logprob for entry in outputs[0].prompt_logprobs if entry is not None]


def test_what_is_kept_of_results_is_bounded(
    tiny_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tiny_models.runner("llama_gqa")
    expected = [score(runner, length) for length in range(1, 9)]
    num_frees = 0

    def free() -> None:
        nonlocal num_frees
        num_frees += 1
        free_pooled_memory()

    free_pooled_memory = model.free_pooled_memory
    monkeypatch.setattr(model, "free_pooled_memory", free)
    for length in range(1, 9):
        assert score(runner, length) == expected[length - 1]
    assert num_frees == 0

    row_bytes = 4 * runner.metadata.vocab_size
    monkeypatch.setattr(model, "_MAX_KEPT_BYTES", 10 * row_bytes)
    runner._result_sizes.clear()
    for length in range(1, 9):  # 1 + 2 + 3 + 4 rows fit; then 6, 8
        assert score(runner, length) == expected[length - 1]
    assert num_frees == 2
    assert score(runner, 8) == expected[7]
    assert num_frees == 2


def test_results_have_few_sizes() -> None:
    sizes = [model.padded_rows(rows) for rows in range(1, 1000)]
    assert sizes[:17] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    assert len(set(sizes)) == 20
    assert all(rows <= size < 1.5 * rows for rows, size in enumerate(sizes, 1))
