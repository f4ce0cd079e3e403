"""Compiled bfloat16 models against NumPy with the inputs of linear layers rounded to bfloat16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy_model
import pytest
from numpy.typing import NDArray
from numpy_model import forward, read_weights
from paged_sequence import PagedSequence
from reference_cases import get_case
from tiny_models import FLOAT_OPT, NUM_PAGES, PAGE_SIZE, TinyModels, relative_error, run_step

from mlc_llm.artifact import read_chat_config
from mlc_llm.device import host_cpu
from mlc_llm.kernels.cpu.isa import find_bf16_isa
from mlc_llm.runtime.pages import PagePool

# The default; `FLOAT_OPT` keeps activations exact.
DEFAULT_OPT = "O2"
# Equal, until a value right between two bfloat16 goes the other way, which later tokens then see.
SAME_ROUNDING = 4e-3
# What rounding costs: half a unit in the last of 8 bits for every input.
ROUNDING_COST = 2e-2

pytestmark = pytest.mark.cpu
needs_bf16 = pytest.mark.skipif(
    find_bf16_isa(host_cpu().isa) is None, reason="this CPU does not multiply bfloat16"
)


def to_bf16(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def expected_logits(
    name: str, token_ids: list[int], monkeypatch: pytest.MonkeyPatch | None
) -> NDArray[np.float64]:
    """Return NumPy's logits on bfloat16 weights, rounding inputs too where it can be patched."""
    case = get_case(name)
    weights = {key: to_bf16(value) for key, value in read_weights(case.directory).items()}
    if monkeypatch is None:
        return forward(case.config(), weights, token_ids)
    linear = numpy_model._linear

    def rounding_linear(named: Any, layer: str, x: NDArray[Any]) -> NDArray[Any]:
        return linear(named, layer, to_bf16(x))

    monkeypatch.setattr(numpy_model, "_linear", rounding_linear)
    # With the identity as output layer, logits are its input.
    tied = case.config().get("tie_word_embeddings")
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    config = {**case.config(), "tie_word_embeddings": False}
    eye = {**weights, "lm_head.weight": np.eye(config["hidden_size"])}
    return to_bf16(forward(config, eye, token_ids)) @ head.T


@needs_bf16
@pytest.mark.parametrize(
    ("name", "opt"),
    [("llama_odd_sizes", DEFAULT_OPT), ("qwen2_tied_bf16", DEFAULT_OPT), ("qwen2_tied_bf16", "O0")],
)
def test_the_default_is_the_model_with_rounded_activations(
    tiny_models: TinyModels, name: str, opt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = get_case(name).load().token_ids.tolist()
    exact = expected_logits(name, tokens, None)
    rounded = expected_logits(name, tokens, monkeypatch)
    runner = tiny_models.runner(name, "q0bf16", opt, kv_cache_dtype="float32")
    found = []
    for size in (len(tokens), 1, 7):
        sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        found.append(np.concatenate([run_step(runner, [(sequence, part)])[0] for part in parts]))
        np.testing.assert_array_equal(found[-1], found[0])
    assert relative_error(found[0][:3], rounded[:3]) < 1e-4
    assert relative_error(found[0], rounded) < SAME_ROUNDING
    assert SAME_ROUNDING / 4 < relative_error(found[0], exact) < ROUNDING_COST


@pytest.mark.parametrize(
    ("device", "opt", "expected"),
    [
        ("x86-64-v4+avx512bf16", DEFAULT_OPT, "bf16_linear"),
        ("x86-64-v4+avx512bf16", "O0", "bf16_linear"),
        ("x86-64-v4+avx512bf16", FLOAT_OPT, "linear"),
        ("x86-64-v4+avx512vnni", DEFAULT_OPT, "linear"),
        ("cortex-a76", DEFAULT_OPT, "linear"),
    ],
)
def test_kernels_by_cpu_and_option(
    tiny_models: TinyModels, device: str, opt: str, expected: str
) -> None:
    from mlc_llm.compiler.compile import CompileOptions, compile_model

    config = read_chat_config(tiny_models.artifact("qwen2_tied_bf16", "q0bf16"))
    compiled = compile_model(config, CompileOptions(device, opt), lambda _: None)
    kernels = compiled.executable.as_text().split()
    assert any(name.startswith(expected) for name in kernels)
    assert ("bf16_linear" in kernels) == (expected == "bf16_linear")
