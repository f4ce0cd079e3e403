"""Linear layers of experts against NumPy: plain, group-quantized and with int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from int8_cases import build_quantizer, isa_of, quantize, runnable_devices
from numpy.typing import NDArray

from mlc_llm.artifact import numpy_dtype
from mlc_llm.device import host_cpu
from mlc_llm.kernels.cpu import expert_linear, group_linear, linear
from mlc_llm.kernels.cpu.activations import Int8Shape
from mlc_llm.kernels.cpu.expert_linear import ExpertShape
from mlc_llm.kernels.cpu.isa import find_isa
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.group import dequantize_group, quantize_group
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

EXPERTS, TOP_K = 7, 3
# Experts that no token is sent to: their weights must not be read.
UNROUTED = [0, 4]
# 1 row an expert, 2, a tile, several, unpacked weights; work by experts and by blocks.
TOKENS = [1, 2, 4, 9, 16, 40, 120]
BEST = find_isa(host_cpu().isa).name


def make_experts(rng: np.random.Generator, n: int) -> NDArray[np.int32]:
    """Return the experts of n * TOP_K pairs; some experts get many, the unrouted ones none."""
    wanted = rng.uniform(0, 1, (n, EXPERTS)) + np.linspace(0, 1, EXPERTS)
    wanted[:, UNROUTED] = -1
    return np.argsort(-wanted, axis=1)[:, :TOP_K].astype(np.int32).reshape(-1)


def make_plan(experts: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the order of pairs and the plan."""
    counts = np.bincount(experts, minlength=EXPERTS)
    [active] = np.nonzero(counts)
    plan = np.zeros(2 * EXPERTS + 2, np.int32)
    plan[1 : EXPERTS + 1] = np.cumsum(counts)
    plan[EXPERTS + 1] = len(active)
    plan[EXPERTS + 2 :][: len(active)] = active
    return np.argsort(experts, kind="stable").astype(np.int32), plan


def check_rows(
    rng: np.random.Generator,
    shape: ExpertShape,
    multiply: Callable[[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]], Any],
    expected: Callable[[NDArray[np.float32], int], tuple[Any, Any]],
) -> None:
    """Assert that results are products with the experts of pairs, whatever else is in the step.

    multiply: x, order, plan -> results. expected: rows, expert -> products and their magnitudes.
    """
    per_row, n = shape.pairs_per_row, max(TOKENS)
    experts = make_experts(rng, n)
    x = rng.standard_normal((n * TOP_K // per_row, shape.in_features)).astype(np.float32)
    together = multiply(x, *make_plan(experts))
    rows = np.repeat(x, per_row, axis=0)
    for expert in set(range(EXPERTS)) - set(UNROUTED):
        chosen = experts == expert
        assert chosen.any()
        value, magnitude = expected(rows[chosen], expert)
        assert (np.abs(together[chosen] - value) <= 2e-6 * magnitude).all()
    for count in TOKENS:
        pairs = slice(0, count * TOP_K)
        found = multiply(x[: count * TOP_K // per_row], *make_plan(experts[pairs]))
        np.testing.assert_array_equal(found, together[pairs])


@pytest.mark.parametrize(
    ("dtype", "out_features", "in_features", "per_row"),
    [("float16", 48, 64, TOP_K), ("bfloat16", 37, 75, 1), ("float32", 37, 75, TOP_K)],
)
def test_plain(
    build: Any,
    rng: np.random.Generator,
    dtype: str,
    out_features: int,
    in_features: int,
    per_row: int,
) -> None:
    shape = ExpertShape(EXPERTS, out_features, in_features, per_row)
    weight = rng.standard_normal((EXPERTS, out_features, in_features)).astype(numpy_dtype(dtype))
    weight[UNROUTED] = np.nan
    packed = pack(build, weight)
    kernel = build(expert_linear.matmul(shape, dtype))

    def multiply(x: Any, order: Any, plan: Any) -> Any:
        return kernel(x, packed, order, plan, shape=(len(order), out_features))

    check_rows(rng, shape, multiply, lambda x, e: exact_product(x, weight[e]))


def pack(build: Any, array: NDArray[Any]) -> Any:
    experts, rows, columns = array.shape
    kernel = build(linear.interleave(rows, columns, array.dtype.name, False, experts))
    return kernel(array, shape=(experts * -(-rows // 16), columns, 16), dtype=array.dtype)


def exact_product(x: NDArray[Any], weight: NDArray[Any]) -> tuple[Any, Any]:
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return x @ weight.T, np.abs(x) @ np.abs(weight).T


class Quantized:
    """A random weight of experts, packed for a kernel, and what it stands for."""

    def __init__(
        self, rng: np.random.Generator, build: Any, name: str, shape: ExpertShape, byte_codes: bool
    ) -> None:
        scheme, in_features = get_scheme(name), shape.in_features
        self.portable = group_format(scheme, False)
        self.form = self.portable.with_byte_codes() if byte_codes else self.portable
        weight = rng.standard_normal((EXPERTS, shape.out_features, in_features))
        words, scales = quantize_group(weight.astype(np.float32), scheme, transpose=False)
        self.value = dequantize_group(words, scales, scheme, in_features, transposed=False)
        words[UNROUTED], scales[UNROUTED] = 0, np.nan
        self.packed = [pack(build, words), pack(build, scales)]
        if self.form != self.portable:
            kernel = build(
                group_linear.widen_codes(shape.out_features, in_features, self.portable, EXPERTS)
            )
            rows = EXPERTS * shape.blocks * 16
            self.packed[0] = kernel(
                words, shape=self.form.word_shape(rows, in_features), dtype=np.uint32
            )


@pytest.mark.parametrize(
    ("name", "out_features", "in_features", "per_row"),
    [("q4f16_1", 64, 96, TOP_K), ("q3f16_1", 37, 75, 1), ("q8f16_1", 37, 75, TOP_K)],
)
def test_group_quantized(
    build: Any,
    rng: np.random.Generator,
    name: str,
    out_features: int,
    in_features: int,
    per_row: int,
) -> None:
    shape = ExpertShape(EXPERTS, out_features, in_features, per_row)
    weight = Quantized(rng, build, name, shape, byte_codes=False)
    kernel = build(expert_linear.group_matmul(shape, weight.form))

    def multiply(x: Any, order: Any, plan: Any) -> Any:
        return kernel(x, *weight.packed, order, plan, shape=(len(order), out_features))

    check_rows(rng, shape, multiply, lambda x, e: exact_product(x, weight.value[e]))


@pytest.mark.parametrize(
    ("device", "name", "out_features", "in_features", "per_row"),
    [
        *((device, "q4f16_1", 64, 96, TOP_K) for device in runnable_devices()),
        (None, "q4f16_1", 64, 96, 1),
        (None, "q3f16_1", 37, 75, 1),
        (None, "q8f16_1", 48, 75, TOP_K),
    ],
)
def test_int8_activations(
    build: Any,
    build_for: Any,
    rng: np.random.Generator,
    device: str | None,
    name: str,
    out_features: int,
    in_features: int,
    per_row: int,
) -> None:
    isa, build_here = (BEST, build) if device is None else (isa_of(device), build_for(device))
    shape = ExpertShape(EXPERTS, out_features, in_features, per_row)
    weight = Quantized(rng, build, name, shape, byte_codes=True)
    kernel = build_here(expert_linear.int8_matmul(shape, weight.form, isa))
    int8_shape = Int8Shape(out_features, in_features, weight.form, isa)
    quantizer = build_quantizer(build_here, int8_shape)

    def multiply(x: Any, order: Any, plan: Any) -> Any:
        return kernel(quantizer(x), *weight.packed, order, plan, shape=(len(order), out_features))

    def expected(x: Any, expert: int) -> tuple[Any, Any]:
        codes, scales, _ = quantize(x, int8_shape)
        rounded = codes * scales[..., None].astype(np.float64)
        return exact_product(rounded.reshape(len(x), -1)[:, :in_features], weight.value[expert])

    check_rows(rng, shape, multiply, expected)
