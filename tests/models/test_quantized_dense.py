"""Quantized families are the unquantized ones with the weights that the artifact stands for.

The unquantized library is itself held against transformers, so no second opinion is needed here.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import (
    FLOAT_OPT,
    INT8_OPT,
    NUM_PAGES,
    PAGE_SIZE,
    TinyModels,
    relative_error,
    run_step,
)

from mlc_llm.artifact import TensorSpec, read_tensor_index
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.group import dequantize_group
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.model import CompiledRunner
from mlc_llm.runtime.pages import PagePool
from mlc_llm.runtime.parameters import load_parameters
from mlc_llm.weights.shards import ShardWriter

# One for each kind of layer, of names and of rules: sandwiched norms and soft caps; q, k and v
# apart; fused checkpoints; norms after; parallel halves; no gate; factors; ALiBi; own modules;
# experts that get a share, also beside a shared one; experts with biases.
CASES = [
    *("gemma2", "gemma3_text", "phi3", "olmo2", "cohere_qk_norm", "nemotron", "minicpm"),
    *("minicpm_moe", "granitemoeshared"),
    *("baichuan_alibi", "internlm2", "chatglm", "llama4_text", "qwen", "gpt_oss"),
]
# Sums of the same float32 products in another order.
SAME_WEIGHTS = 1e-5
# What int8 activations cost models with weights as large as these.
ROUNDING_COST = 0.1


def dequantized_artifact(models: TinyModels, name: str, quantization: str, output: Path) -> Path:
    """Write an artifact in q0f32 with the values that a quantized one stands for."""
    case, scheme = get_case(name), get_scheme(quantization)
    family = find_family(case.config())
    config = family.config_from_huggingface(case.config())
    stored = read_tensor_index(models.artifact(name, quantization))
    shutil.copytree(models.artifact(name), output)
    values: list[tuple[TensorSpec, NDArray[np.float32]]] = []
    for item in plan_parameters(family, config, scheme):
        arrays = [stored.read(spec.name) for spec in item.outputs]
        if len(arrays) == 1:
            [array] = arrays
        else:
            transposed = scheme.layout == "KN" and "embed" not in item.name
            array = dequantize_group(*arrays, scheme, item.shape[-1], transposed=transposed)
        spec = dataclasses.replace(item.outputs[0], name=item.name, shape=item.shape)
        values.append((dataclasses.replace(spec, dtype="float32"), array.astype(np.float32)))
    writer = ShardWriter(output, [spec for spec, _ in values], "dequantized")
    for spec, array in values:
        writer.add(spec, array)
    writer.publish({})
    return output


def run_prompt(runner: CompiledRunner, name: str, chunk: int | None = None) -> NDArray[np.float32]:
    prompt = get_case(name).load().token_ids.tolist()
    sequence, size = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE)), chunk or len(prompt)
    parts = [prompt[start : start + size] for start in range(0, len(prompt), size)]
    return np.concatenate([run_step(runner, [(sequence, part)])[0] for part in parts])


@pytest.mark.cpu
@pytest.mark.parametrize("name", CASES)
def test_quantized_is_dequantized(tiny_models: TinyModels, name: str, tmp_path: Path) -> None:
    library = load_library(tiny_models.library(name))
    artifact = dequantized_artifact(tiny_models, name, "q4f16_1", tmp_path / "plain")
    parameters = load_parameters(artifact, library, lambda _: None)
    expected = run_prompt(CompiledRunner(library, parameters, NUM_PAGES), name)
    assert relative_error(expected, get_case(name).load().logits) > 1e-2
    runner = tiny_models.runner(name, "q4f16_1", FLOAT_OPT, kv_cache_dtype="float32")
    for chunk in (None, 1):
        assert relative_error(run_prompt(runner, name, chunk), expected) < SAME_WEIGHTS
    runner = tiny_models.runner(name, "q4f16_1", INT8_OPT, kv_cache_dtype="float32")
    assert 1e-4 < relative_error(run_prompt(runner, name), expected) < ROUNDING_COST
