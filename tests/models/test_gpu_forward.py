"""The engine's own entries on a GPU: what transformers computed, and what a CPU computes.

Runs where there is a GPU; OpenCL on the CPU (Debian's pocl-opencl-icd) is one. The device is the
first that is found, or what MLC_LLM_TEST_DEVICE names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gpu_device import find_gpu
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import NUM_PAGES, PAGE_SIZE, TinyModels, relative_error, run_step

from mlc_llm.artifact import read_chat_config
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.errors import DeviceError, LibraryMismatch
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.parameters import load_parameters
from mlc_llm.runtime.runner import ModelRunner, SampleRows

pytestmark = pytest.mark.cpu

# Families of different layers: windows, biases, soft-caps, norms of heads, partial rotation ...
FLOAT_CASES = [
    *("llama_gqa", "mistral_sliding_window", "qwen3", "gemma2", "gpt_neox", "llama_odd_sizes"),
]
# The norm of what the device's numbers may lose against a CPU's float32. Qwen3's heads are wide
# enough for tensor cores.
SCHEMES = [
    *(("llama_gqa", "q0f16", 5e-3), ("llama_gqa", "q4f16_1", 5e-3), ("llama_gqa", "q4f32_1", 1e-4)),
    ("qwen3", "q0f16", 5e-3),
]


@pytest.fixture(scope="module")
def device() -> str:
    return find_gpu()


class OnGPU:
    """A tiny model on the device, with all pages free."""

    def __init__(self, runner: ModelRunner, prompt: list[int]) -> None:
        self.runner, self.prompt = runner, prompt
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)

    def logits_of(self, chunk: int) -> np.ndarray:
        """Return the prompt's logits, `chunk` tokens a step."""
        sequence = PagedSequence(self.pool)
        parts = [self.prompt[i : i + chunk] for i in range(0, len(self.prompt), chunk)]
        found = [run_step(self.runner, [(sequence, part)])[0] for part in parts]
        sequence.truncate(0)
        return np.concatenate(found)


@pytest.fixture
def llama(tiny_models: TinyModels, device: str) -> Iterator[OnGPU]:
    prompt = get_case("llama_gqa").load().token_ids.tolist()
    with closing(tiny_models.gpu_runner("llama_gqa", "q0f32", device)) as runner:
        yield OnGPU(runner, prompt)


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_logits_equal_the_reference(tiny_models: TinyModels, device: str, name: str) -> None:
    reference = get_case(name).load()
    with closing(tiny_models.gpu_runner(name, "q0f32", device)) as runner:
        model = OnGPU(runner, reference.token_ids.tolist())
        whole = model.logits_of(len(model.prompt))
        assert relative_error(whole, reference.logits) < 1e-4
        for chunk in (1, 7):
            assert relative_error(model.logits_of(chunk), reference.logits) < 1e-4


@pytest.mark.parametrize(("name", "quantization", "limit"), SCHEMES)
def test_quantized_is_what_a_cpu_computes(
    tiny_models: TinyModels, device: str, name: str, quantization: str, limit: float
) -> None:
    prompt = get_case(name).load().token_ids.tolist()
    try:
        made = tiny_models.gpu_runner(name, quantization, device)
    except DeviceError as error:
        assert "does not compute in float16" in str(error)
        pytest.skip(str(error))
    expected = OnGPU(tiny_models.runner(name, quantization), prompt).logits_of(len(prompt))
    with closing(made) as runner:
        model = OnGPU(runner, prompt)
        assert relative_error(model.logits_of(len(prompt)), expected) < limit
        assert relative_error(model.logits_of(1), expected) < limit


def test_batched_is_alone(llama: OnGPU) -> None:
    alone = llama.logits_of(len(llama.prompt))
    first, second, third = (PagedSequence(llama.pool) for _ in range(3))
    work = [(first, llama.prompt[:5]), (second, llama.prompt[:1]), (third, llama.prompt[:9])]
    for (_, tokens), found in zip(work, run_step(llama.runner, work), strict=True):
        assert relative_error(found, alone[: len(tokens)]) < 1e-5
    # Single tokens of all, after different numbers of others.
    work = [(sequence, [llama.prompt[len(tokens)]]) for sequence, tokens in work]
    for (sequence, _), found in zip(work, run_step(llama.runner, work), strict=True):
        at = len(sequence.token_ids) - 1
        assert relative_error(found, alone[at : at + 1]) < 1e-5


def test_pages_are_copied(llama: OnGPU) -> None:
    alone = llama.logits_of(len(llama.prompt))
    original, copy = PagedSequence(llama.pool), PagedSequence(llama.pool)
    tokens = llama.prompt[:-1]
    run_step(llama.runner, [(original, tokens)])
    copy.grow(tokens)
    llama.runner.copy_pages(original.pages, copy.pages)
    llama.runner.copy_pages([copy.pages[-1]], [original.pages[0]])  # spoils the original alone
    (found,) = run_step(llama.runner, [(copy, llama.prompt[-1:])])
    assert relative_error(found, alone[-1:]) < 1e-5


def test_tokens_are_chosen(llama: OnGPU) -> None:
    logits = llama.logits_of(len(llama.prompt))
    count = len(logits)
    greedy = SampleRows(
        temperature=np.zeros(count, np.float32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        uniform=np.full(count, 0.5),
    )
    np.testing.assert_array_equal(llama.runner.sample(logits, greedy), logits.argmax(-1))


def test_a_linked_library_runs(tiny_models: TinyModels, device: str, tmp_path: Path) -> None:
    reference = get_case("llama_gqa").load()
    artifact, path = tiny_models.artifact("llama_gqa"), tmp_path / "library.so"
    compiled = compile_model(read_chat_config(artifact), CompileOptions(device), lambda _: None)
    compiled.save(path, tmp_path, lambda _: None)
    loaded = load_library(path)  # it says itself what it is for
    assert str(loaded.device) == device
    parameters = load_parameters(artifact, loaded, lambda _: None)
    with closing(CompiledRunner(loaded, parameters, NUM_PAGES)) as runner:
        model = OnGPU(runner, reference.token_ids.tolist())
        assert relative_error(model.logits_of(len(model.prompt)), reference.logits) < 1e-4
    with pytest.raises(LibraryMismatch, match=r"compiled for .*, the device is cpu:0"):
        load_library(path, "cpu")
