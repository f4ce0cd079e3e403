"""Compiled quantized models against NumPy on the weights that the artifact stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy_model
import pytest
from numpy.typing import NDArray
from numpy_model import forward, read_weights
from packed_layouts import read_float8
from paged_sequence import PagedSequence
from reference_cases import ReferenceCase, get_case
from tiny_models import (
    FLOAT_OPT,
    INT8_OPT,
    NUM_PAGES,
    PAGE_SIZE,
    Logits,
    TinyModels,
    relative_error,
    run_step,
)

from mlc_llm.artifact import read_tensor_index
from mlc_llm.models.plan import ParamPlan, Stack
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.group import dequantize_group
from mlc_llm.quantization.schemes import Scheme, get_scheme
from mlc_llm.runtime.pages import PagePool

# Float32 activations: weights are exact and sums are float32, so only float16 KV rounds.
TOLERANCE = {"float32": 1e-5, "float16": 3e-3}
# Int8 activations, against a model that rounds them too: equal, until a value right between two
# codes goes the other way, which later tokens then see. Float16 KV moves values between codes.
SAME_ROUNDING = {"float32": 1.5e-2, "float16": 4e-2}
# Int8 activations against exact ones: what rounding costs models with weights as large as these.
ROUNDING_COST = 6e-2
# Both layouts, 3, 4 and 8 bits, every dtype, and what is left unquantized.
SCHEMES = ["q3f16_1", "q4f16_0", "q4f16_1", "q4f16_2", "q4bf16_1", "q4f32_1", "q8f16_1"]

FLOAT8_SCHEMES = ["e5m2_e5m2_f16", "e4m3_e4m3_f16", "fp8_e4m3fn_bf16_block_scale"]
# Dtypes of scales are covered by the tests of the kernel.
INT8_SCHEMES = ["q3f16_1", "q4f16_0", "q4f16_1", "q4f16_2", "q8f16_1"]


def stored_weights(case: ReferenceCase, artifact: Path, scheme: Scheme) -> dict[str, NDArray[Any]]:
    """Return the artifact's weights, dequantized and under their Hugging Face names."""
    config = case.config()
    family = find_family(config)
    index = read_tensor_index(artifact)
    shapes = {name: weight.shape for name, weight in read_weights(case.directory).items()}
    weights: dict[str, NDArray[Any]] = {}
    for item in plan_parameters(family, family.config_from_huggingface(config), scheme):
        arrays = [index.read(spec.name) for spec in item.outputs]
        value = arrays[0] if len(arrays) == 1 else dequantize(item, arrays, scheme)
        if isinstance(item.rule.combine, Stack):
            value = value.reshape(-1, value.shape[-1])  # experts under each other
        sizes = [shapes[source][0] for source in item.rule.sources]
        parts = np.split(value, np.cumsum(sizes)[:-1])
        weights.update(zip(item.rule.sources, parts, strict=True))
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    return weights


def dequantize(item: ParamPlan, arrays: list[NDArray[Any]], scheme: Scheme) -> NDArray[Any]:
    if scheme.kind == "float8":
        named = {spec.name: array for spec, array in zip(item.outputs, arrays, strict=True)}
        return read_float8(named, item.name.removesuffix(".weight"))
    is_linear = len(item.shape) == 2 and "embed" not in item.name
    transposed = scheme.layout == "KN" and is_linear
    return dequantize_group(*arrays, scheme, item.shape[-1], transposed=transposed)


def round_to_int8(x: NDArray[np.float64], group_size: int) -> NDArray[np.float64]:
    """Round each group of each row (n, in) to 127 steps of its largest magnitude."""
    n, width = x.shape
    groups = np.zeros((n, -(-width // group_size) * group_size))
    groups[:, :width] = x
    groups = groups.reshape(n, -1, group_size)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 127
    codes = np.rint(groups / np.where(scale == 0, 1, scale))
    return (codes * scale).reshape(n, -1)[:, :width]


class Quantized:
    """A reference case in a scheme: its prompt, and its logits in NumPy."""

    def __init__(self, models: TinyModels, name: str, quantization: str) -> None:
        self.models, self.name, self.quantization = models, name, quantization
        self.case, self.scheme = get_case(name), get_scheme(quantization)
        self.prompt = self.case.load().token_ids.tolist()
        artifact = models.artifact(name, quantization)
        self.weights = stored_weights(self.case, artifact, self.scheme)

    def expected(self) -> NDArray[np.float64]:
        return forward(self.case.config(), self.weights, self.prompt)

    def expected_int8(self, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float64]:
        """Return logits with the inputs of quantized layers rounded to int8."""
        linear, group_size = numpy_model._linear, self.scheme.group_size

        def rounding_linear(weights: Any, name: str, x: NDArray[Any]) -> NDArray[Any]:
            return linear(weights, name, round_to_int8(x, group_size))

        monkeypatch.setattr(numpy_model, "_linear", rounding_linear)
        # With the identity as output layer, logits are its input.
        config = {**self.case.config(), "tie_word_embeddings": False}
        weights = {**self.weights, "lm_head.weight": np.eye(config["hidden_size"])}
        hidden = forward(config, weights, self.prompt)
        if self.scheme.quantize_final_fc:
            hidden = round_to_int8(hidden, group_size)
        tied = self.case.config().get("tie_word_embeddings")
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return hidden @ head.astype(np.float64).T

    def compiled(self, opt: str, chunk: int | None = None, **overrides: Any) -> Logits:
        """Return logits of the compiled model, `chunk` tokens a step."""
        runner = self.models.runner(self.name, self.quantization, opt, **overrides)
        sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        size = chunk or len(self.prompt)
        parts = [self.prompt[i : i + size] for i in range(0, len(self.prompt), size)]
        return np.concatenate([run_step(runner, [(sequence, part)])[0] for part in parts])


@pytest.mark.cpu
@pytest.mark.parametrize("quantization", ["q0f16", "q0bf16", *SCHEMES, *FLOAT8_SCHEMES])
def test_float_path_is_the_dequantized_model(tiny_models: TinyModels, quantization: str) -> None:
    model = Quantized(tiny_models, "llama_odd_sizes", quantization)
    expected = model.expected()
    for chunk in (None, 1):
        logits = model.compiled(FLOAT_OPT, chunk, kv_cache_dtype="float32")
        assert relative_error(logits, expected) < TOLERANCE["float32"]


@pytest.mark.cpu
@pytest.mark.parametrize("quantization", INT8_SCHEMES)
def test_int8_path_is_the_model_with_rounded_activations(
    tiny_models: TinyModels, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Quantized(tiny_models, "llama_odd_sizes", quantization)
    exact, rounded = model.expected(), model.expected_int8(monkeypatch)
    for chunk in (None, 1, 7):
        logits = model.compiled(INT8_OPT, chunk, kv_cache_dtype="float32")
        assert relative_error(logits[:3], rounded[:3]) < TOLERANCE["float32"]
        error = relative_error(logits, rounded)
        assert error < SAME_ROUNDING["float32"] < relative_error(logits, exact) < ROUNDING_COST


@pytest.mark.cpu
@pytest.mark.parametrize("quantization", ["q0f16", "e4m3_e4m3_f16"])
def test_weights_that_are_no_integers_keep_exact_activations(
    tiny_models: TinyModels, quantization: str
) -> None:
    model = Quantized(tiny_models, "llama_odd_sizes", quantization)
    logits = model.compiled(INT8_OPT, kv_cache_dtype="float32")
    assert relative_error(logits, model.expected()) < TOLERANCE["float32"]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama_gqa", "q0f16"),
        ("llama_gqa", "q4f16_1"),
        ("llama_tied", "q4f16_1"),
        ("qwen2_gqa", "q4f16_1"),
        ("mixtral", "q4f16_1"),
        ("qwen2_moe", "q0bf16"),
        ("qwen2_moe", "q3f16_1"),
        ("qwen3_moe", "q4f16_0"),
    ],
)
def test_families_with_the_default_cache(
    tiny_models: TinyModels, name: str, quantization: str
) -> None:
    model = Quantized(tiny_models, name, quantization)
    logits = model.compiled(FLOAT_OPT)
    assert relative_error(logits, model.expected()) < TOLERANCE["float16"]


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_gqa"])
def test_families_with_the_default_path(
    tiny_models: TinyModels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Quantized(tiny_models, name, "q4f16_1")
    logits = model.compiled(INT8_OPT)
    assert relative_error(logits, model.expected_int8(monkeypatch)) < SAME_ROUNDING["float16"]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("mixtral", "q4f16_1"),
        ("qwen2_moe", "q8f16_1"),
        ("qwen3_moe", "q3f16_1"),
        ("deepseek", "q4f16_1"),
    ],
)
def test_families_with_experts(
    tiny_models: TinyModels, name: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is float32: a rounding there can send a token to another expert."""
    model = Quantized(tiny_models, name, quantization)
    logits = model.compiled(INT8_OPT, kv_cache_dtype="float32")
    assert relative_error(logits, model.expected_int8(monkeypatch)) < SAME_ROUNDING["float32"]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("quantization", "override", "expected"),
    [
        ("q0f32", "auto", "float32"),
        ("q0f32", "float16", "float16"),
        ("q4f16_1", "auto", "float16"),
        ("q4f16_1", "float32", "float32"),
    ],
)
def test_dtype_of_the_cache(
    tiny_models: TinyModels, quantization: str, override: str, expected: str
) -> None:
    overrides = {} if override == "auto" else {"kv_cache_dtype": override}
    name = "llama_odd_sizes"
    library = tiny_models.library(name, quantization, FLOAT_OPT, **overrides)
    assert f'"dtype": "{expected}"' in (library / "metadata.json").read_text()
    model = Quantized(tiny_models, name, quantization)
    logits = model.compiled(FLOAT_OPT, **overrides)
    assert relative_error(logits, model.expected()) < TOLERANCE[expected]


@pytest.mark.cpu
def test_quantization_costs_accuracy_in_the_order_of_bits(tiny_models: TinyModels) -> None:
    case = get_case("llama_gqa")
    reference = case.load()
    errors = []
    for quantization in ("q0f32", "q0f16", "q8f16_1", "q4f16_1"):
        runner = tiny_models.runner(case.name, quantization, FLOAT_OPT)
        sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        [logits] = run_step(runner, [(sequence, reference.token_ids.tolist())])
        errors.append(relative_error(logits, reference.logits))
    assert errors == sorted(errors)
    assert errors[2] < 0.05 < errors[3]


@pytest.mark.cpu
def test_int8_cache_costs_little(tiny_models: TinyModels) -> None:
    model = Quantized(tiny_models, "llama_gqa", "q4f32_1")
    exact = model.compiled(FLOAT_OPT, kv_cache_dtype="float32")
    for chunk in (None, 1):
        logits = model.compiled(FLOAT_OPT, chunk, kv_cache_dtype="int8")
        assert 1e-4 < relative_error(logits, exact) < 3e-2
