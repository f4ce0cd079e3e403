"""Made-up parameters: codes in range, magnitudes of trained weights, memory of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlc_llm.artifact import TensorSpec
from mlc_llm.bench.random_weights import RandomSource, weight_bytes_of
from mlc_llm.quantization.group import dequantize_group
from mlc_llm.quantization.schemes import SCHEMES

from .fakes import METADATA

GROUP_SCHEMES = [scheme for scheme in SCHEMES.values() if scheme.kind == "group"]
FLOAT_SPECS = [
    TensorSpec("model.norm.weight", (3000,), "bfloat16"),
    TensorSpec("lm_head.weight", (300, 100), "bfloat16"),
    TensorSpec("model.layers.0.self_attn.qkv_proj.bias", (4000,), "bfloat16"),
]


def quantized_specs(scheme: Any, rows: int, columns: int) -> list[TensorSpec]:
    groups = scheme.num_groups(columns)
    return [
        TensorSpec("a.q_weight", (rows, groups * scheme.words_per_group), "uint32"),
        TensorSpec("a.q_scale", (rows, groups), scheme.dtype),
    ]


@pytest.mark.parametrize("scheme", GROUP_SCHEMES, ids=lambda scheme: scheme.name)
def test_quantized_weights_look_like_trained_ones(scheme: Any) -> None:
    specs = quantized_specs(scheme, 60, 480)
    source = RandomSource(specs, scheme.bits, seed=0)
    words, scales = (source.view(spec) for spec in specs)
    used = scheme.values_per_word * scheme.bits
    assert (words.astype(np.uint64) >> np.uint64(used) == 0).all()
    codes = np.stack([words >> (i * scheme.bits) for i in range(scheme.values_per_word)])
    codes &= (1 << scheme.bits) - 1
    assert codes.min() == 0 and codes.max() == 2 * scheme.max_int
    weight = dequantize_group(words, scales, scheme, 480, transposed=False)
    assert weight.shape == (60, 480)
    assert 0.01 < weight.std() < 0.04
    assert abs(weight.mean()) < 0.002
    # No two rows are alike.
    assert len(np.unique(weight[:, :16], axis=0)) == 60


def test_floats_have_the_magnitude_of_their_kind() -> None:
    source = RandomSource(FLOAT_SPECS, 0, seed=0)
    norm, weight, bias = (source.view(spec).astype(np.float32) for spec in FLOAT_SPECS)
    assert norm.shape == (3000,) and weight.shape == (300, 100) and bias.shape == (4000,)
    assert norm.mean() == pytest.approx(1, abs=0.02) and 0.05 < norm.std() < 0.15
    for values in (weight, bias):
        assert abs(values.mean()) < 0.002 and 0.015 < values.std() < 0.025


@pytest.mark.parametrize("scale", ["q_scale", "weight_scale_inv"])
def test_eight_bit_floats_look_like_trained_ones(scale: str) -> None:
    specs = [
        TensorSpec("a.weight", (300, 100), "float8_e4m3fn"),
        TensorSpec(f"a.{scale}", (300, 1), "float32"),
    ]
    source = RandomSource(specs, 0, seed=0)
    codes, scales = (source.view(spec).astype(np.float32) for spec in specs)
    assert (scales > 0.4).all()
    assert 0.01 < (codes * scales).std() < 0.04


def values_of(seed: int) -> list[NDArray[Any]]:
    scheme = SCHEMES["q4f16_1"]
    specs = quantized_specs(scheme, 8, 64) * 2
    source = RandomSource(specs, scheme.bits, seed)
    return [source.view(spec).copy() for spec in specs]


def test_the_seed_decides() -> None:
    same = zip(values_of(1), values_of(1), strict=True)
    assert all((left == right).all() for left, right in same)
    assert (values_of(1)[0] != values_of(2)[0]).any()


def test_parameters_of_a_kind_differ_and_are_aligned_views() -> None:
    spec = TensorSpec("a.q_weight", (100, 64), "uint32")
    source = RandomSource([spec, spec], 4, seed=0)
    first, second = source.view(spec), source.view(spec)
    assert (first != second).any()
    assert np.shares_memory(first, second)
    assert source.shares(first) and not source.shares(first.copy())
    assert first.ctypes.data % 64 == 0 == second.ctypes.data % 64


def test_a_table_that_is_only_looked_up_in_is_not_read() -> None:
    table = TensorSpec("transformer.wte.q_weight", (10, 4), "uint32")
    norm = TensorSpec("transformer.wte_norm.weight", (8,), "float16")
    parameters = [np.zeros(table.shape, np.uint32), np.zeros(norm.shape, np.float16)]
    metadata = dataclasses.replace(METADATA, params=[table, norm])
    assert weight_bytes_of(metadata, parameters) == 160 + 16
    untied = dataclasses.replace(metadata, lookup_tables=["transformer.wte"])
    assert weight_bytes_of(untied, parameters) == 16


def test_experts_that_a_token_has_not_are_not_read() -> None:
    experts = TensorSpec("model.layers.0.moe.e2.q_weight", (8, 10, 4), "uint32")
    other = TensorSpec("model.layers.0.moe.gate.weight", (8, 4), "float16")
    parameters = [np.zeros(experts.shape, np.uint32), np.zeros(other.shape, np.float16)]
    config = {"num_local_experts": 8, "num_experts_per_tok": 2}
    metadata = dataclasses.replace(METADATA, params=[experts, other])
    assert weight_bytes_of(metadata, parameters) == 8 * 160 + 64
    metadata = dataclasses.replace(metadata, model_config=config)
    assert weight_bytes_of(metadata, parameters) == 2 * 160 + 64
