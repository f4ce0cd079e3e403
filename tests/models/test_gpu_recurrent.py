"""Recurrent models on a GPU: what transformers computed, and what an engine on a CPU says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest
from gpu_device import find_gpu
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import NUM_PAGES, PAGE_SIZE, Logits, TinyModels, relative_error, run_step

from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.runner import ModelRunner

pytestmark = pytest.mark.cpu


@dataclass
class OnGPU:
    """A tiny model on the device, its runner on the CPU, and what transformers computed."""

    runner: ModelRunner
    on_cpu: ModelRunner
    prompt: list[int]
    reference: Logits

    def logits_of(self, chunk: int) -> Logits:
        """Return the prompt's logits, `chunk` tokens a step."""
        sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        parts = [self.prompt[i : i + chunk] for i in range(0, len(self.prompt), chunk)]
        return np.concatenate([run_step(self.runner, [(sequence, part)])[0] for part in parts])


@pytest.fixture(scope="module", params=["rwkv5", "rwkv6", "qwen3_5"])
def model(request, tiny_models: TinyModels) -> Iterator[OnGPU]:  # type: ignore[no-untyped-def]
    name = request.param
    case = get_case(name).load()
    on_cpu = tiny_models.runner(name)
    with closing(tiny_models.gpu_runner(name, "q0f32", find_gpu())) as runner:
        yield OnGPU(runner, on_cpu, case.token_ids.tolist(), case.logits)


@pytest.mark.parametrize("chunk", [1000, 7, 1])
def test_logits_equal_the_reference(model: OnGPU, chunk: int) -> None:
    assert relative_error(model.logits_of(chunk), model.reference) < 1e-4


def test_batched_is_alone(model: OnGPU) -> None:
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    sequences = [PagedSequence(pool) for _ in range(3)]
    # Pieces shorter and longer than what a convolution keeps; last, single tokens of all.
    for counts in ((9, 1, 19), (2, 17, 1), (1, 1, 1)):
        starts = [len(sequence.token_ids) for sequence in sequences]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        pieces = list(zip(starts, ends, strict=True))
        tokens = [model.prompt[start:end] for start, end in pieces]
        found = run_step(model.runner, list(zip(sequences, tokens, strict=True)))
        for (start, end), logits in zip(pieces, found, strict=True):
            assert relative_error(logits, model.reference[start:end]) < 1e-4


def test_states_are_copied_one_after_the_other(model: OnGPU) -> None:
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    original, *copies = (PagedSequence(pool) for _ in range(3))
    run_step(model.runner, [(original, model.prompt[:15])])
    for copy in copies:
        copy.grow(model.prompt[:15])
        if model.runner.metadata.kv_cache.num_layers:
            model.runner.copy_pages(original.pages, copy.pages)
    slots = [sequence.pages[0] for sequence in (original, *copies)]
    # The first copy is what the second one is made of; then the original changes.
    model.runner.copy_states(slots[:2], slots[1:])
    run_step(model.runner, [(original, [5])])
    found = run_step(model.runner, [(copy, model.prompt[15:17]) for copy in copies])
    for logits in found:
        assert relative_error(logits, model.reference[15:17]) < 1e-4


def said_by(runner: ModelRunner, prompt: list[int]) -> list[list[int]]:
    """Return greedy answers: two of a prompt, then one that goes on from a snapshot of it."""
    engine = Engine(runner, max_num_sequence=4)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    said: dict[tuple[str, int], list[int]] = {}

    def answer(request: Request) -> int:
        stats = engine.add(request)
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                if output.token_id is not None:
                    said.setdefault((output.request_id, output.index), []).append(output.token_id)
            engine.check_integrity()
        return stats.cached_tokens

    answer(Request("first", prompt, params, n=2))
    assert answer(Request("second", [*prompt, *said["first", 0], 9, 8, 7], params)) >= PAGE_SIZE
    assert said["first", 0] == said["first", 1]
    return list(said.values())


def test_engine_says_what_a_cpu_says(model: OnGPU) -> None:
    prompt = model.prompt[:37]
    assert said_by(model.runner, prompt) == said_by(model.on_cpu, prompt)
