"""Routing to experts against NumPy: the choice, the order of pairs, and the mixing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlc_llm.artifact import numpy_dtype
from mlc_llm.kernels.cpu import routing as kernels
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.runtime.memory import aligned_zeros

pytestmark = pytest.mark.cpu

TOKENS = [1, 3, 4, 29]
ROUTINGS = {
    "mixtral": Routing(8, 2),
    "qwen2 moe": Routing(60, 4, renormalize=False),
    "qwen3 moe": Routing(128, 8),
    "odd": Routing(7, 3, scale=2.5),
    "all": Routing(5, 5),
    "deepseek v2": Routing(
        64, 6, renormalize=False, scale=16.0, num_groups=8, top_groups=3, group_score="max"
    ),
    "deepseek v3": Routing(
        48, 4, "sigmoid", scale=2.5, num_groups=6, top_groups=2, group_score="top2_sum"
    ),
    "sigmoid": Routing(20, 1, "sigmoid", renormalize=False),
}


def expected_route(
    routing: Routing, logits: NDArray[Any], bias: NDArray[Any] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return experts, best first, and their weights, by definition."""
    logits = logits.astype(np.float64)
    if routing.scoring == "softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores if bias is None else scores + bias.astype(np.float64)
    n, groups = len(choice), routing.num_groups
    if groups > 1:
        grouped = choice.reshape(n, groups, -1)
        best = np.sort(grouped, axis=2)[:, :, ::-1]
        takes_two = routing.group_score == "top2_sum"
        rating = best[:, :, :2].sum(axis=2) if takes_two else best[:, :, 0]
        kept = np.argsort(-rating, axis=1)[:, : routing.top_groups]
        masked = np.full_like(grouped, -np.inf)
        for row in range(n):
            masked[row, kept[row]] = grouped[row, kept[row]]
        choice = masked.reshape(n, -1)
    experts = np.argsort(-choice, axis=1)[:, : routing.top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    if routing.renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return experts, weights * routing.scale


def run_route(
    build: Any, routing: Routing, logits: NDArray[Any], bias: NDArray[Any] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    kernel = build(kernels.route(routing, None if bias is None else bias.dtype.name))
    shape = (len(logits), routing.top_k)
    experts = aligned_zeros(shape, np.int32)
    extra = [] if bias is None else [bias]
    weights = kernel(logits, *extra, experts, shape=shape)
    return experts, weights


@pytest.mark.parametrize(
    ("name", "bias_dtype"),
    [*((name, None) for name in ROUTINGS), ("deepseek v3", "float32"), ("qwen3 moe", "bfloat16")],
)
def test_experts_and_their_weights(
    build: Any, rng: np.random.Generator, name: str, bias_dtype: str | None
) -> None:
    routing = ROUTINGS[name]
    bias = None
    if bias_dtype is not None:
        # Large enough to change choices, negative ones among them.
        bias = (rng.standard_normal(routing.num_experts) * 0.3).astype(numpy_dtype(bias_dtype))
    for n in TOKENS:
        logits = (rng.standard_normal((n, routing.num_experts)) * 3).astype(np.float32)
        experts, weights = run_route(build, routing, logits, bias)
        expected_experts, expected_weights = expected_route(routing, logits, bias)
        np.testing.assert_array_equal(experts, expected_experts)
        np.testing.assert_allclose(weights, expected_weights, rtol=2e-6)


def test_the_first_of_equals_is_chosen(build: Any) -> None:
    logits = np.zeros((2, 20), np.float32)
    logits[1, [3, 17]] = 5
    experts, weights = run_route(build, Routing(20, 3), logits, None)
    np.testing.assert_array_equal(experts, [[0, 1, 2], [3, 17, 0]])
    np.testing.assert_allclose(weights[0], 1 / 3, rtol=1e-6)


def test_experts_of_logits_that_are_no_numbers_exist(build: Any) -> None:
    logits = np.full((5, 8), np.nan, np.float32)
    experts, _ = run_route(build, Routing(8, 2), logits, None)
    assert ((experts >= 0) & (experts < 8)).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (3, 1)])
def test_pairs_in_the_order_of_experts(
    build: Any, rng: np.random.Generator, num_experts: int, top_k: int
) -> None:
    kernel = build(kernels.order_by_expert(num_experts, top_k))
    for n in TOKENS:
        scores = rng.standard_normal((n, num_experts))
        scores[:, num_experts // 2] = -9  # an expert that nobody wants
        experts = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)
        order = aligned_zeros((n * top_k,), np.int32)
        plan = kernel(experts, order, shape=(2 * num_experts + 2,), dtype=np.int32)
        np.testing.assert_array_equal(order, np.argsort(experts.reshape(-1), kind="stable"))
        counts = np.bincount(experts.reshape(-1), minlength=num_experts)
        np.testing.assert_array_equal(np.diff(plan[: num_experts + 1]), counts)
        [active] = np.nonzero(counts)
        assert plan[0] == 0 and plan[num_experts + 1] == len(active)
        np.testing.assert_array_equal(plan[num_experts + 2 :][: len(active)], active)


@pytest.mark.parametrize(("top_k", "width"), [(2, 64), (4, 37), (1, 16)])
def test_mixing(build: Any, rng: np.random.Generator, top_k: int, width: int) -> None:
    kernel = build(kernels.mix(top_k, width))
    y = rng.standard_normal((29 * top_k, width)).astype(np.float32)
    weights = rng.uniform(0, 1, (29, top_k)).astype(np.float32)
    together = kernel(y, weights, shape=(29, width))
    expected = (y.reshape(29, top_k, width) * weights[..., None].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-6)
    for n in TOKENS:
        found = kernel(y[: n * top_k], weights[:n], shape=(n, width))
        np.testing.assert_array_equal(found, together[:n])


@pytest.mark.parametrize(("top_k", "width"), [(2, 37), (1, 16)])
def test_weights_before_mixing(
    build: Any, rng: np.random.Generator, top_k: int, width: int
) -> None:
    y = rng.standard_normal((7 * top_k, width)).astype(np.float32)
    weights = rng.uniform(0, 1, (7, top_k)).astype(np.float32)
    weighed = build(kernels.weigh(top_k, width))(y, weights, shape=y.shape)
    np.testing.assert_array_equal(weighed, y * weights.reshape(-1, 1))
    mixed = build(kernels.mix(top_k, width, False))(weighed, weights, shape=(7, width))
    expected = weighed.reshape(7, top_k, width).astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6)


def test_scaling_by_a_gate(build: Any, rng: np.random.Generator) -> None:
    kernel = build(kernels.scale_by_sigmoid(37))
    x = rng.standard_normal((5, 37)).astype(np.float32)
    logits = np.asarray([[-200], [-2], [0], [3], [200]], np.float32)
    expected = x / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(kernel(x, logits, shape=(5, 37)), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(("width", "dtype"), [(48, "float16"), (37, "bfloat16")])
def test_biases_of_experts(build: Any, rng: np.random.Generator, width: int, dtype: str) -> None:
    kernel = build(kernels.add_expert_bias(6, 2, width, dtype))
    bias = rng.standard_normal((6, width)).astype(numpy_dtype(dtype))
    experts = rng.integers(0, 6, (9, 2)).astype(np.int32)
    y = rng.standard_normal((18, width)).astype(np.float32)
    expected = y + bias.astype(np.float32)[experts.reshape(-1)]
    np.testing.assert_array_equal(kernel(y, experts, bias, shape=y.shape), expected)
