"""The entry `encode`: hidden states after the final norm, against the plain NumPy model."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_model import hidden_states, read_weights
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import INT8_OPT, NUM_PAGES, PAGE_SIZE, TinyModels, make_step, relative_error

from mlc_llm.engine.encoder import Encoder
from mlc_llm.errors import OptionError
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.pages import PagePool

pytestmark = pytest.mark.cpu

CASES = ["llama_gqa", "llama_tied", "qwen2_gqa"]
TASK = {"model_task": "embedding"}


@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_equals_the_reference(tiny_models: TinyModels, name: str) -> None:
    case = get_case(name)
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 100, 40)]
    expected = hidden_states(case.config(), read_weights(case.directory), tokens)
    runner = tiny_models.runner(name, **TASK)
    assert runner.metadata.model_task == "embedding"
    sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
    found = runner.encode(make_step([(sequence, tokens)]))
    assert found.dtype == np.float32
    assert relative_error(found, expected) < 1e-5


def test_inputs_in_one_step_equal_inputs_alone(tiny_models: TinyModels) -> None:
    draw = np.random.default_rng(1)
    inputs = [draw.integers(3, 100, n).tolist() for n in (1, 17, 5, 31)]
    encoder = Encoder(tiny_models.runner("llama_gqa", **TASK))
    together = encoder.encode(inputs)
    case = get_case("llama_gqa")
    weights = read_weights(case.directory)
    for row, tokens in zip(together, inputs, strict=True):
        np.testing.assert_array_equal(row, encoder.encode([tokens])[0])
        expected = hidden_states(case.config(), weights, tokens)[-1]
        assert relative_error(row, expected) < 1e-5


def test_quantized_linears_keep_the_direction(tiny_models: TinyModels) -> None:
    case = get_case("llama_gqa")
    tokens = list(range(3, 30))
    expected = hidden_states(case.config(), read_weights(case.directory), tokens)[-1]
    encoder = Encoder(tiny_models.runner("llama_gqa", "q8f16_1", INT8_OPT, **TASK))
    found = encoder.encode([tokens])[0]
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.99  # 8-bit weights and activations


def test_the_library_has_one_entry_and_its_memory(tiny_models: TinyModels) -> None:
    compiled = tiny_models.compile("llama_tied", **TASK)
    usage = compiled.metadata.memory_usage
    assert set(usage) == {"encode", "pack_params"} and usage["encode"] > 0
    assert f"{usage['encode'] / 2**20:.1f} MiB" in compiled.memory_plan()
    machine = load_library(tiny_models.library("llama_tied", **TASK)).open_machine()
    assert machine["encode"]
    for other in ("forward", "sample"):
        with pytest.raises(AttributeError):
            machine[other]


def test_an_unknown_task_is_refused(tiny_models: TinyModels) -> None:
    with pytest.raises(OptionError, match="model_task='rerank' is not one of chat, embedding"):
        tiny_models.compile("llama_tied", model_task="rerank")
