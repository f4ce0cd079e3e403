"""Routing and products of mixtures of experts on GPUs, run as WGSL, against NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.kernels.gpu import experts, routing
from mlc_llm.kernels.gpu.expert_weights import ExpertWeights
from mlc_llm.quantization.apply import group_format
from mlc_llm.quantization.group import dequantize_group, quantize_group
from mlc_llm.quantization.schemes import get_scheme

# What a sum of products may lose.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}
WORKGROUP_BYTES = 8  # that a thread loads at once on any GPU

SIGMOID = Routing(12, 3, "sigmoid", renormalize=False, scale=2.5)
ROUTINGS = {
    "mixtral": Routing(8, 2),
    "qwen2_moe": Routing(60, 4, renormalize=False),
    "all experts": Routing(3, 3),
    "more experts than threads": Routing(300, 5),
    "deepseek_v2": Routing(12, 3, renormalize=False, scale=1.5, num_groups=4, top_groups=2),
    "sigmoid": SIGMOID,
    "deepseek_v3": dataclasses.replace(
        SIGMOID, renormalize=True, num_groups=4, top_groups=2, group_score="top2_sum"
    ),
}


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def choose(
    how: Routing, logits: np.ndarray, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return experts and weights; of equal scores the first counts as the higher."""
    logits = logits.astype(np.float64)
    if how.scoring == "softmax":
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    choices = scores.copy() if bias is None else scores + bias
    if how.num_groups > 1:
        grouped = np.sort(choices.reshape(len(logits), how.num_groups, -1), axis=2)
        rating = grouped[:, :, -1]
        if how.group_score == "top2_sum":
            rating = grouped[:, :, -2:].sum(2)
        for row, order in zip(choices, np.argsort(-rating, axis=1, kind="stable"), strict=True):
            row.reshape(how.num_groups, -1)[order[how.top_groups :]] = -np.inf
    chosen = np.argsort(-choices, axis=1, kind="stable")[:, : how.top_k].astype(np.int32)
    weights = np.take_along_axis(scores, chosen, 1)
    if how.renormalize:
        weights /= weights.sum(1, keepdims=True)
    return chosen, weights * how.scale


def route(
    webgpu: Any, how: Routing, logits: np.ndarray, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the kernel chooses."""
    extra = {} if bias is None else {"bias": bias}
    kernel = routing.route(how, str(logits.dtype), None if bias is None else str(bias.dtype))
    shape = (len(logits), how.top_k)
    found = webgpu.run(
        kernel,
        logits=logits,
        chosen=np.full(shape, -1, np.int32),
        weights=np.full(shape, np.nan, np.float32),
        **extra,
    )
    return found["chosen"], found["weights"]


@pytest.mark.parametrize("name", ROUTINGS)
def test_experts_are_chosen(webgpu: Any, name: str) -> None:
    how = ROUTINGS[name]
    logits, bias = 2 * normal((5, how.num_experts)), None
    logits[0] = 0.5  # all alike
    logits[1, :2] = 40  # nothing is left for others
    if name in ("sigmoid", "deepseek_v3"):
        bias = 0.3 * np.abs(normal((how.num_experts,), seed=1))
    chosen, weights = route(webgpu, how, logits, bias)
    expected, expected_weights = choose(how, logits, bias)
    # Scores of float32 have ties that those of float64 have not.
    rows = [0, 2, 3, 4]
    np.testing.assert_array_equal(chosen[rows], expected[rows])
    np.testing.assert_allclose(weights[rows], expected_weights[rows], rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(chosen[1, : min(2, how.top_k)], expected[1, : min(2, how.top_k)])


def test_logits_of_float16(webgpu: Any) -> None:
    if not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    logits = 2 * normal((4, 8), "float16")
    chosen, weights = route(webgpu, ROUTINGS["mixtral"], logits)
    expected, expected_weights = choose(ROUTINGS["mixtral"], logits, None)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-5)


def test_what_is_no_number_chooses_experts_that_are_there(webgpu: Any) -> None:
    logits = normal((3, 8))
    logits[0], logits[1, 3] = np.nan, np.nan
    chosen, weights = route(webgpu, ROUTINGS["mixtral"], logits)
    assert ((chosen >= 0) & (chosen < 8)).all() and (chosen[:, 0] != chosen[:, 1]).all()
    expected, expected_weights = choose(ROUTINGS["mixtral"], logits[2:], None)
    np.testing.assert_array_equal(chosen[2:], expected)
    np.testing.assert_allclose(weights[2:], expected_weights, rtol=2e-5)


def order_of(webgpu: Any, chosen: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return order and plan of chosen experts."""
    n, top_k = chosen.shape
    size = num_experts + 1 + routing.num_tiles(n * top_k, num_experts)
    found = webgpu.run(
        routing.order_by_expert(num_experts, top_k, 0),
        experts=chosen,
        order=np.full(n * top_k, -1, np.int32),
        plan=np.full(size, -7, np.int32),
    )
    return found["order"], found["plan"]


def spread(n: int, num_experts: int, top_k: int, taken: list[int]) -> np.ndarray:
    """Return experts (n, top_k) of which only some are taken, the first one by all tokens."""
    rng = np.random.default_rng(3)
    rows = [[taken[0], *rng.permutation(taken[1:])[: top_k - 1]] for _ in range(n)]
    assert max(taken) < num_experts
    return np.array(rows, np.int32)


@pytest.mark.parametrize("n", [1, 300])
def test_pairs_are_ordered(webgpu: Any, n: int) -> None:
    chosen = spread(n, 9, 2, [5, 0, 2, 8])
    order, plan = order_of(webgpu, chosen, 9)
    flat = chosen.reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    starts = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=9))])
    np.testing.assert_array_equal(plan[:10], starts)
    # Tiles as the product reads them: every pair is in one of its expert's.
    covered = []
    for tile, e in enumerate(plan[10:].tolist()):
        if e >= 0:
            first = starts[e] + (tile - starts[e] // routing.TILE - e) * routing.TILE
            pairs = order[first : min(first + routing.TILE, starts[e + 1])]
            assert len(pairs) and (flat[pairs] == e).all()
            covered += pairs.tolist()
    assert sorted(covered) == list(range(len(flat)))


@dataclasses.dataclass
class Stored:
    """Weights of experts as an artifact stores them, and what they are in float64."""

    weights: ExpertWeights
    tensors: dict[str, np.ndarray]
    values: np.ndarray

    def spoil(self, e: int) -> None:
        """Make an expert's weights no numbers."""
        name = "scales" if "scales" in self.tensors else "weight"
        self.tensors[name][e] = np.nan


def make_weights(scheme: str, shape: tuple[int, int, int]) -> Stored:
    weight = normal(shape, seed=1)
    if scheme in ("float32", "float16"):
        stored = weight.astype(scheme)
        return Stored(ExpertWeights(*shape, scheme), {"weight": stored}, stored.astype(np.float64))
    found = get_scheme(scheme)
    words, scales = quantize_group(weight, found, transpose=False)
    values = dequantize_group(words, scales, found, shape[2], transposed=False)
    weights = ExpertWeights(*shape, found.dtype, group_format(found, is_linear=False))
    return Stored(weights, {"words": words, "scales": scales.copy()}, values.astype(np.float64))


def check_product(
    webgpu: Any, stored: Stored, chosen: np.ndarray, dtype: str, is_pairs: bool
) -> None:
    """Compare the products of all pairs; experts that are not chosen are no numbers."""
    weights, (n, top_k) = stored.weights, chosen.shape
    for e in set(range(weights.num_experts)) - set(chosen.reshape(-1).tolist()):
        stored.spoil(e)
    rows = np.arange(n * top_k) // (1 if is_pairs else top_k)
    x = normal((rows[-1] + 1, weights.in_features), dtype)
    order, plan = order_of(webgpu, chosen, weights.num_experts)
    found = webgpu.run(
        experts.matmul(
            weights, Routing(weights.num_experts, top_k), is_pairs, dtype, WORKGROUP_BYTES
        ),
        x=x,
        **stored.tensors,
        chosen=chosen,
        order=order,
        plan=plan,
        out=np.full((n * top_k, weights.out_features), np.nan, dtype),
    )["out"]
    of_pairs = stored.values[chosen.reshape(-1)]
    expected = np.einsum("pi,poi->po", x[rows].astype(np.float64), of_pairs)
    tolerance = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=tolerance, rtol=0)


# Tokens of a step: pair by pair, and in tiles, of which some are not full.
STEPS = [3, 70]
PRODUCTS = {
    "float32, a last unit that is not full": ("float32", (8, 9, 31), False),
    "float32, a depth that is not full": ("float32", (8, 70, 112), False),
    "float16, few units": ("float16", (8, 70, 44), True),
    "float16, many units": ("float16", (8, 9, 1160), False),
    "3 bits, one unit": ("q3f16_1", (8, 24, 20), True),
    "4 bits, many units": ("q4f16_1", (8, 9, 1160), False),
    "4 bits, a last group that is not full": ("q4f32_1", (8, 70, 112), True),
    "8 bits": ("q8f16_1", (8, 70, 96), False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(webgpu: Any, name: str) -> None:
    scheme, shape, is_pairs = PRODUCTS[name]
    dtype = "float16" if "f16" in scheme or scheme == "float16" else "float32"
    if dtype == "float16" and not webgpu.has_float16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    for n in STEPS:
        # Two experts get nothing, one gets a pair of every token.
        chosen = spread(n, 8, 3, [6, 0, 1, 2, 4, 7])
        check_product(webgpu, make_weights(scheme, shape), chosen, dtype, is_pairs)


def test_what_experts_return_is_mixed(webgpu: Any) -> None:
    n, top_k, width = 5, 3, 24
    y, weights = normal((n * top_k, width)), normal((n, top_k), seed=1)
    chosen, bias = spread(n, 4, top_k, [2, 0, 1, 3]), normal((4, width), seed=2)
    logits = 3 * normal((n, 1), seed=3)
    pairs = y.reshape(n, top_k, width)
    weighed = (pairs * weights[:, :, None]).reshape(y.shape)
    runs = {
        "mix": (routing.mix(None, top_k, width, "float32"), weights, weighed),
        "sum": (routing.mix(None, top_k, width, "float32", False), weights, y),
    }
    for kernel, given, expected in runs.values():
        total = expected.reshape(pairs.shape).sum(1)
        out = np.zeros((n, width), np.float32)
        found = webgpu.run(kernel, y=y, of_pairs=given, out=out)["out"]
        np.testing.assert_allclose(found, total, atol=1e-5)
    found = webgpu.run(
        routing.weigh(None, top_k, width, "float32"), y=y, of_pairs=weights, out=np.zeros_like(y)
    )["out"]
    np.testing.assert_allclose(found, weighed, atol=1e-6)
    kernel = routing.add_expert_bias(None, 4, top_k, width, "float32")
    found = webgpu.run(kernel, y=y, of_pairs=chosen, bias=bias, out=np.zeros_like(y))["out"]
    np.testing.assert_allclose(found, y + bias[chosen.reshape(-1)], atol=1e-6)
    x = normal((n, width))
    kernel = routing.scale_by_sigmoid(None, width, "float32")
    found = webgpu.run(kernel, x=x, logits=logits, out=np.zeros_like(x))["out"]
    np.testing.assert_allclose(found, x / (1 + np.exp(-logits)), atol=1e-6)
