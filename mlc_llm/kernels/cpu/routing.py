"""Routing of tokens to experts: choose them, order the tokens by expert, and mix what they return.

A pair is a token and one of its experts: pair t * top_k + j is token t's j-th choice. Knows neither
experts nor their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import (
    exp,
    lane_dtype,
    multiply_add,
    reduce_max,
    reduce_sum,
    span,
    splat,
    vector_lanes,
)

# Below this many tokens a parallel launch costs more than it saves.
_PARALLEL_TOKENS = 4
# Below every score and above every mark of what may not be chosen.
_LOWEST, _TAKEN = -1.0e30, -3.0e38


@dataclass(frozen=True)
class Routing:
    """How a token's experts and their weights follow from its logits, one for each expert.

    Scores are the softmax or the sigmoid of the logits. The top_k experts of the highest scores
    are chosen; where there is a bias, it is added to scores for that choice alone. Where num_groups
    is above 1, experts come from the top_groups best groups only: a group is as good as its best
    expert ("max"), or as its best two together ("top2_sum"; DeepSeek-AI 2024, section 2.1.2).
    Weights are the scores of the chosen, divided by their sum if renormalize, times scale.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


def route(routing: Routing, bias_dtype: str | None = None) -> Any:
    """Choose experts: logits (n, experts) float32[, bias (experts)]
    -> experts (n, top_k) int32, best first, and weights (n, top_k) float32.

    Of equal scores, that of the first expert counts as the higher.
    """
    experts, top_k = routing.num_experts, routing.top_k
    groups, group_size = routing.num_groups, routing.num_experts // routing.num_groups
    has_bias, is_softmax = bias_dtype is not None, routing.scoring == "softmax"
    is_grouped, takes_two = groups > 1, routing.group_score == "top2_sum"
    renormalize, scale, top_groups = routing.renormalize, routing.scale, routing.top_groups
    lanes = vector_lanes(experts)
    steps = experts // lanes

    @T.macro
    def softmax(logits: T.handle, scores: T.handle, t: T.int32) -> None:
        state = T.alloc_buffer((2, lanes), "float32")  # the maximum, the sum
        state[0, span(0, lanes)] = logits[t, span(0, lanes)]
        for i in T.serial(steps - 1):
            state[0, span(0, lanes)] = T.max(
                state[0, span(0, lanes)], logits[t, span((i + 1) * lanes, lanes)]
            )
        state[0, span(0, lanes)] = splat(reduce_max(state[0, span(0, lanes)], lanes), lanes)
        state[1, span(0, lanes)] = splat(T.float32(0), lanes)
        for i in T.serial(steps):
            scores[span(i * lanes, lanes)] = exp(
                logits[t, span(i * lanes, lanes)] - state[0, span(0, lanes)], lanes
            )
            state[1, span(0, lanes)] = state[1, span(0, lanes)] + scores[span(i * lanes, lanes)]
        state[1, span(0, lanes)] = splat(
            T.float32(1) / reduce_sum(state[1, span(0, lanes)], lanes), lanes
        )
        for i in T.serial(steps):
            scores[span(i * lanes, lanes)] = (
                scores[span(i * lanes, lanes)] * state[1, span(0, lanes)]
            )

    @T.macro
    def sigmoid(logits: T.handle, scores: T.handle, t: T.int32) -> None:
        for i in T.serial(steps):
            scores[span(i * lanes, lanes)] = splat(T.float32(1), lanes) / (
                splat(T.float32(1), lanes) + exp(-logits[t, span(i * lanes, lanes)], lanes)
            )

    @T.macro
    def find_best(
        values: T.handle, best: T.handle, place: T.handle, start: T.int32, count: T.meta_var
    ) -> None:
        """place[0] = where the highest of `count` values is, best[0] = that value."""
        best[0] = T.float32(_TAKEN)
        place[0] = start
        for i in T.serial(count):
            if values[start + i] > best[0]:
                best[0] = values[start + i]
                place[0] = start + i

    @T.macro
    def rate_groups(ratings: T.handle, choices: T.handle, best: T.handle, place: T.handle) -> None:
        second = T.alloc_buffer((1,), "float32")
        for g in T.serial(groups):
            find_best(choices, best, place, g * group_size, group_size)
            ratings[g] = best[0]
            if takes_two:
                second[0] = T.float32(_LOWEST)
                for i in T.serial(group_size):
                    if g * group_size + i != place[0]:
                        second[0] = T.max(second[0], choices[g * group_size + i])
                ratings[g] = best[0] + second[0]

    @T.macro
    def close_groups(choices: T.handle, best: T.handle, place: T.handle) -> None:
        """Mark the experts of all but the best groups as taken."""
        ratings = T.alloc_buffer((groups,), "float32")
        is_open = T.alloc_buffer((groups,), "int32")
        rate_groups(ratings, choices, best, place)
        for g in T.serial(groups):
            is_open[g] = 0
        for _ in T.serial(top_groups):
            find_best(ratings, best, place, 0, groups)
            is_open[place[0]] = 1
            ratings[place[0]] = T.float32(_TAKEN)
        for g in T.serial(groups):
            if is_open[g] == 0:
                for i in T.serial(group_size):
                    choices[g * group_size + i] = T.float32(_TAKEN)

    @T.macro
    def one_token(
        logits: T.handle, bias: T.handle, chosen: T.handle, weights: T.handle, t: T.int32
    ) -> None:
        scores = T.alloc_buffer((experts,), "float32")
        choices = T.alloc_buffer((experts,), "float32")
        best = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        place = T.alloc_buffer((1,), "int32")
        if is_softmax:
            softmax(logits, scores, t)
        else:
            sigmoid(logits, scores, t)
        for e in T.serial(experts):
            choices[e] = scores[e] + T.Cast("float32", bias[e]) if has_bias else scores[e]
        if is_grouped:
            close_groups(choices, best, place)
        total[0] = T.float32(0)
        for j in T.serial(top_k):
            find_best(choices, best, place, 0, experts)
            choices[place[0]] = T.float32(_TAKEN)
            chosen[t, j] = place[0]
            weights[t, j] = scores[place[0]]
            total[0] = total[0] + scores[place[0]]
        total[0] = (
            T.float32(scale) / T.max(total[0], T.float32(1e-20))
            if renormalize
            else T.float32(scale)
        )
        for j in T.serial(top_k):
            weights[t, j] = weights[t, j] * total[0]

    @T.macro
    def all_tokens(
        logits: T.handle, bias: T.handle, chosen: T.handle, weights: T.handle, n: T.int32
    ) -> None:
        if n < _PARALLEL_TOKENS:
            for t in T.serial(n):
                one_token(logits, bias, chosen, weights, t)
        else:
            for t in T.parallel(n):
                one_token(logits, bias, chosen, weights, t)

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def route_bias_kernel(
            logits_handle: T.handle,
            bias: T.Buffer((experts,), bias_dtype),
            chosen_handle: T.handle,
            weights_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            logits = T.match_buffer(logits_handle, (n, experts), "float32")
            chosen = T.match_buffer(chosen_handle, (n, top_k), "int32")
            weights = T.match_buffer(weights_handle, (n, top_k), "float32")
            all_tokens(logits, bias, chosen, weights, n)

        return route_bias_kernel

    @T.prim_func(private=True, s_tir=True)
    def route_kernel(
        logits_handle: T.handle, chosen_handle: T.handle, weights_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        logits = T.match_buffer(logits_handle, (n, experts), "float32")
        chosen = T.match_buffer(chosen_handle, (n, top_k), "int32")
        weights = T.match_buffer(weights_handle, (n, top_k), "float32")
        all_tokens(logits, logits, chosen, weights, n)

    return route_kernel


def order_by_expert(num_experts: int, top_k: int) -> Any:
    """Sort pairs: experts (n, top_k) int32 -> order (n * top_k) int32, the pairs of the first
    expert first, and plan (2 * experts + 2) int32.

    The plan has num_experts + 1 numbers, where in `order` each expert begins, the end last; then
    how many experts have pairs; then these experts.
    """
    starts = num_experts + 1

    @T.prim_func(private=True, s_tir=True)
    def order_by_expert_kernel(
        experts_handle: T.handle, order_handle: T.handle, plan: T.Buffer((2 * starts,), "int32")
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        pairs = T.int32()
        experts = T.match_buffer(experts_handle, (n, top_k), "int32")
        order = T.match_buffer(order_handle, (pairs,), "int32")
        free = T.alloc_buffer((num_experts,), "int32")  # the next place of each expert
        for e in T.serial(2 * starts):
            plan[e] = 0
        for t in T.serial(n):
            for j in T.serial(top_k):
                plan[experts[t, j] + 1] = plan[experts[t, j] + 1] + 1
        for e in T.serial(num_experts):
            if plan[e + 1] > 0:
                plan[starts + 1 + plan[starts]] = e
                plan[starts] = plan[starts] + 1
            plan[e + 1] = plan[e + 1] + plan[e]
            free[e] = plan[e]
        for t in T.serial(n):
            for j in T.serial(top_k):
                order[free[experts[t, j]]] = t * top_k + j
                free[experts[t, j]] = free[experts[t, j]] + 1

    return order_by_expert_kernel


def weigh(top_k: int, width: int) -> Any:
    """Weigh: y (n * top_k, width) float32, a row a pair, weights (n, top_k) float32
    -> y with every row times its weight.
    """
    lanes = vector_lanes(width)

    @T.macro
    def one_pair(y: T.handle, weights: T.handle, out: T.handle, pair: T.int32) -> None:
        for i in T.serial(width // lanes):
            out[pair, span(i * lanes, lanes)] = y[pair, span(i * lanes, lanes)] * splat(
                weights[pair // top_k, pair % top_k], lanes
            )

    @T.prim_func(private=True, s_tir=True)
    def weigh_kernel(y_handle: T.handle, weights_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        pairs = T.int32()
        y = T.match_buffer(y_handle, (pairs, width), "float32")
        weights = T.match_buffer(weights_handle, (n, top_k), "float32")
        out = T.match_buffer(out_handle, (pairs, width), "float32")
        if n < _PARALLEL_TOKENS:
            for pair in T.serial(pairs):
                one_pair(y, weights, out, pair)
        else:
            for pair in T.parallel(pairs):
                one_pair(y, weights, out, pair)

    return weigh_kernel


def mix(top_k: int, width: int, is_weighted: bool = True) -> Any:
    """Mix: y (n * top_k, width) float32, a row a pair, weights (n, top_k) float32
    -> (n, width), the weighted sums of each token's rows, in the order of its choices. If not
    is_weighted, rows have their weights already.
    """
    lanes = vector_lanes(width)

    @T.macro
    def one_token(y: T.handle, weights: T.handle, out: T.handle, t: T.int32) -> None:
        total = T.alloc_buffer((lanes,), "float32")
        for i in T.serial(width // lanes):
            total[span(0, lanes)] = splat(T.float32(0), lanes)
            for j in T.unroll(top_k):
                total[span(0, lanes)] = multiply_add(
                    y[t * top_k + j, span(i * lanes, lanes)],
                    splat(weights[t, j] if is_weighted else T.float32(1), lanes),
                    total[span(0, lanes)],
                    lanes,
                )
            out[t, span(i * lanes, lanes)] = total[span(0, lanes)]

    @T.prim_func(private=True, s_tir=True)
    def mix_kernel(y_handle: T.handle, weights_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        pairs = T.int32()
        y = T.match_buffer(y_handle, (pairs, width), "float32")
        weights = T.match_buffer(weights_handle, (n, top_k), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        if n < _PARALLEL_TOKENS:
            for t in T.serial(n):
                one_token(y, weights, out, t)
        else:
            for t in T.parallel(n):
                one_token(y, weights, out, t)

    return mix_kernel


def scale_by_sigmoid(width: int) -> Any:
    """Scale rows: x (n, width), logits (n, 1), both float32 -> x * sigmoid(logits)."""
    lanes = vector_lanes(width)

    @T.prim_func(private=True, s_tir=True)
    def scale_by_sigmoid_kernel(
        x_handle: T.handle, logits_handle: T.handle, out_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), "float32")
        logits = T.match_buffer(logits_handle, (n, 1), "float32")
        out = T.match_buffer(out_handle, (n, width), "float32")
        factor = T.alloc_buffer((lanes,), "float32")
        for t in T.serial(n):
            factor[span(0, lanes)] = splat(
                T.float32(1) / (T.float32(1) + exp(-logits[t, 0], 1)), lanes
            )
            for i in T.serial(width // lanes):
                out[t, span(i * lanes, lanes)] = (
                    x[t, span(i * lanes, lanes)] * factor[span(0, lanes)]
                )

    return scale_by_sigmoid_kernel


def add_expert_bias(num_experts: int, top_k: int, width: int, dtype: str) -> Any:
    """Add: y (n * top_k, width) float32, experts (n, top_k) int32, bias (experts, width)
    -> y plus the bias of each pair's expert, float32.
    """
    lanes = vector_lanes(width)
    vector = lane_dtype("float32", lanes)

    @T.macro
    def one_token(
        y: T.handle, experts: T.handle, bias: T.handle, out: T.handle, t: T.int32
    ) -> None:
        for j in T.serial(top_k):
            for i in T.serial(width // lanes):
                out[t * top_k + j, span(i * lanes, lanes)] = y[
                    t * top_k + j, span(i * lanes, lanes)
                ] + T.Cast(vector, bias[experts[t, j], span(i * lanes, lanes)])

    @T.prim_func(private=True, s_tir=True)
    def add_expert_bias_kernel(
        y_handle: T.handle,
        experts_handle: T.handle,
        bias: T.Buffer((num_experts, width), dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        pairs = T.int32()
        y = T.match_buffer(y_handle, (pairs, width), "float32")
        experts = T.match_buffer(experts_handle, (n, top_k), "int32")
        out = T.match_buffer(out_handle, (pairs, width), "float32")
        if n < _PARALLEL_TOKENS:
            for t in T.serial(n):
                one_token(y, experts, bias, out, t)
        else:
            for t in T.parallel(n):
                one_token(y, experts, bias, out, t)

    return add_expert_bias_kernel
