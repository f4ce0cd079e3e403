"""Quantizations beside those in groups, and int8 keys and values, on a GPU: as on a CPU."""

from __future__ import annotations

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
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.parameters import load_parameters
from mlc_llm.runtime.runner import ModelRunner

pytestmark = pytest.mark.cpu


def logits_of(runner: ModelRunner, prompt: list[int], chunk: int) -> np.ndarray:
    """Return the prompt's logits, `chunk` tokens a step."""
    sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
    parts = [prompt[i : i + chunk] for i in range(0, len(prompt), chunk)]
    return np.concatenate([run_step(runner, [(sequence, part)])[0] for part in parts])


@pytest.mark.parametrize(
    ("name", "kv_dtype", "chunks", "limit"),
    [
        # bfloat16 has 8 bits of a number; hidden states have so many on GPUs, more on CPUs.
        ("fp8_e4m3fn_bf16_block_scale", "float32", (48,), 3e-2),
        ("q0f32", "int8", (48, 1), 1e-4),
    ],
)
def test_logits_equal_a_cpu(
    tiny_models: TinyModels,
    tmp_path: Path,
    name: str,
    kv_dtype: str,
    chunks: tuple[int, ...],
    limit: float,
) -> None:
    overrides = {"kv_cache_dtype": kv_dtype}
    prompt = get_case("llama_gqa").load().token_ids.tolist()
    expected = logits_of(tiny_models.runner("llama_gqa", name, **overrides), prompt, len(prompt))
    artifact, device = tiny_models.artifact("llama_gqa", name), find_gpu()
    options = CompileOptions(device, overrides=overrides)
    compile_model(read_chat_config(artifact), options, lambda _: None).save_objects(tmp_path)
    loaded = load_library(tmp_path, device)
    parameters = load_parameters(artifact, loaded, lambda _: None)
    with closing(CompiledRunner(loaded, parameters, NUM_PAGES)) as runner:
        for chunk in chunks:
            assert relative_error(logits_of(runner, prompt, chunk), expected) < limit
