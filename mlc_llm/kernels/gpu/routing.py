"""Routing of tokens to experts on GPUs: choose them, order their pairs, mix what they return.

A pair is a token and one of its experts: pair t * top_k + j is token t's j-th choice. Knows neither
experts nor their weights.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.script import tirx as T

from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.kernels.gpu.rows import (
    RowCount,
    computation,
    compute,
    constant,
    narrow,
    num_rows,
    tensor,
    wide,
)

# Threads of a block at most; every GPU has so many.
THREADS = 256
# Pairs of one expert that are multiplied together.
TILE = 32
# Below every score and above every mark of what may not be chosen.
_LOWEST, _CLOSED = -1.0e30, -3.0e38


def few_tokens(routing: Routing) -> int:
    """Return up to how many tokens of a step go to experts pair by pair, without an order.

    So many tokens have no more pairs than there are experts: few experts get two.
    """
    return max(1, routing.num_experts // routing.top_k)


def route(routing: Routing, dtype: str, bias_dtype: str | None = None) -> Any:
    """Choose experts: logits (n, experts) of dtype[, bias (experts)]
    -> experts (n, top_k) int32, best first, and weights (n, top_k) float32.

    What is chosen is said in `Routing`; of equal scores, that of the first expert counts as the
    higher. A block for each token; an expert's place is the number of those that go before it.
    """
    experts, top_k = routing.num_experts, routing.top_k
    groups, group_size = routing.num_groups, routing.num_experts // routing.num_groups
    has_bias, is_softmax = bias_dtype is not None, routing.scoring == "softmax"
    is_grouped, takes_two = groups > 1, routing.group_score == "top2_sum"
    renormalize, scale, top_groups = routing.renormalize, routing.scale, routing.top_groups
    threads = min(THREADS, -(-experts // 32) * 32)
    steps = -(-experts // threads)

    def goes_before(other: Any, mine: Any, i: Any, e: Any) -> Any:
        return T.Or(other > mine, T.And(other == mine, i < e))

    @T.macro
    def softmax(scores: T.handle, thread: T.int32) -> None:
        state = T.alloc_buffer((2,), "float32", scope="local")
        own = T.alloc_buffer((steps,), "float32", scope="local")
        state[0] = scores[0]
        for e in T.serial(experts):
            state[0] = T.max(state[0], scores[e])
        for i in T.unroll(steps):
            if i * threads + thread < experts:
                own[i] = T.exp(scores[i * threads + thread] - state[0])
        T.tvm_storage_sync("shared")
        for i in T.unroll(steps):
            if i * threads + thread < experts:
                scores[i * threads + thread] = own[i]
        T.tvm_storage_sync("shared")
        # Every thread sums in the same order.
        state[1] = T.float32(0)
        for e in T.serial(experts):
            state[1] = state[1] + scores[e]
        T.tvm_storage_sync("shared")
        for i in T.unroll(steps):
            if i * threads + thread < experts:
                scores[i * threads + thread] = own[i] / state[1]
        T.tvm_storage_sync("shared")

    @T.macro
    def sigmoid(scores: T.handle, thread: T.int32) -> None:
        for i in T.unroll(steps):
            if i * threads + thread < experts:
                scores[i * threads + thread] = T.float32(1) / (
                    T.float32(1) + T.exp(-scores[i * threads + thread])
                )
        T.tvm_storage_sync("shared")

    @T.macro
    def close_groups(choices: T.handle, thread: T.int32) -> None:
        """Mark the experts of all but the best groups as what may not be chosen."""
        ratings = T.alloc_buffer((groups,), "float32", scope="shared")
        best = T.alloc_buffer((2,), "float32", scope="local")
        place = T.alloc_buffer((1,), "int32", scope="local")
        for i in T.unroll((groups + threads - 1) // threads):
            g: T.let = i * threads + thread
            if g < groups:
                best[0] = T.float32(_LOWEST)
                best[1] = T.float32(_LOWEST)
                for k in T.serial(group_size):
                    # The best two: what the new one pushes out may be the second.
                    best[1] = T.max(best[1], T.min(best[0], choices[g * group_size + k]))
                    best[0] = T.max(best[0], choices[g * group_size + k])
                ratings[g] = best[0] + best[1] if takes_two else best[0]
        T.tvm_storage_sync("shared")
        for i in T.unroll(steps):
            e: T.let = i * threads + thread
            if e < experts:
                place[0] = 0
                best[0] = ratings[e // group_size]
                for g in T.serial(groups):
                    best[1] = ratings[g]
                    if goes_before(best[1], best[0], g, e // group_size):
                        place[0] = place[0] + 1
                if place[0] >= top_groups:
                    choices[e] = T.float32(_CLOSED)
        T.tvm_storage_sync("shared")

    @T.macro
    def one_token(
        logits: T.handle,
        bias: T.handle,
        chosen: T.handle,
        weights: T.handle,
        t: T.int32,
        thread: T.int32,
    ) -> None:
        scores = T.alloc_buffer((experts,), "float32", scope="shared")
        choices = T.alloc_buffer((experts,), "float32", scope="shared")
        best = T.alloc_buffer((top_k,), "float32", scope="shared")
        expert = T.alloc_buffer((top_k,), "int32", scope="shared")
        place = T.alloc_buffer((1,), "int32", scope="local")
        pair = T.alloc_buffer((2,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        for i in T.unroll(steps):
            if i * threads + thread < experts:
                scores[i * threads + thread] = T.Cast("float32", logits[t, i * threads + thread])
        for i in T.unroll((top_k + threads - 1) // threads):
            if i * threads + thread < top_k:
                expert[i * threads + thread] = i * threads + thread
        T.tvm_storage_sync("shared")
        if is_softmax:
            softmax(scores, thread)
        else:
            sigmoid(scores, thread)
        for i in T.unroll(steps):
            e: T.let = i * threads + thread
            if e < experts:
                total[0] = scores[e] + T.Cast("float32", bias[e]) if has_bias else scores[e]
                # What is not a number goes behind all others: places are never shared.
                choices[e] = T.if_then_else(
                    total[0] >= T.float32(_LOWEST), total[0], T.float32(_LOWEST)
                )
        T.tvm_storage_sync("shared")
        if is_grouped:
            close_groups(choices, thread)
        for i in T.unroll(steps):
            mine: T.let = i * threads + thread
            if mine < experts:
                place[0] = 0
                pair[0] = choices[mine]
                for k in T.serial(experts):
                    pair[1] = choices[k]
                    if goes_before(pair[1], pair[0], k, mine):
                        place[0] = place[0] + 1
                if place[0] < top_k:
                    expert[place[0]] = mine
                    best[place[0]] = scores[mine]
        T.tvm_storage_sync("shared")
        total[0] = T.float32(0)
        for j in T.serial(top_k):
            total[0] = total[0] + best[j]
        total[0] = (
            T.float32(scale) / T.max(total[0], T.float32(1e-20))
            if renormalize
            else T.float32(scale)
        )
        for i in T.unroll((top_k + threads - 1) // threads):
            choice: T.let = i * threads + thread
            if choice < top_k:
                chosen[t, choice] = expert[choice]
                weights[t, choice] = best[choice] * total[0]

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def route_bias_kernel(
            logits_handle: T.handle,
            bias: T.Buffer((experts,), bias_dtype),
            chosen_handle: T.handle,
            weights_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            n = T.int32()
            logits = T.match_buffer(logits_handle, (n, experts), dtype)
            chosen = T.match_buffer(chosen_handle, (n, top_k), "int32")
            weights = T.match_buffer(weights_handle, (n, top_k), "float32")
            for t in T.thread_binding(n, thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    one_token(logits, bias, chosen, weights, t, thread)

        return route_bias_kernel

    @T.prim_func(private=True, s_tir=True)
    def route_kernel(
        logits_handle: T.handle, chosen_handle: T.handle, weights_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n = T.int32()
        logits = T.match_buffer(logits_handle, (n, experts), dtype)
        chosen = T.match_buffer(chosen_handle, (n, top_k), "int32")
        weights = T.match_buffer(weights_handle, (n, top_k), "float32")
        for t in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                one_token(logits, logits, chosen, weights, t, thread)

    return route_kernel


def num_tiles(pairs: Any, num_experts: int) -> Any:
    """Return how many tiles a plan has room for."""
    return pairs // TILE + num_experts


def order_by_expert(num_experts: int, top_k: int, few: int) -> Any:
    """Sort pairs: experts (n, top_k) int32 -> order (n * top_k) int32, the pairs of the first
    expert first, and plan (num_experts + 1 + `num_tiles`) int32. Nothing for up to `few` tokens.

    The plan says where in `order` each expert begins, the end last; then for each tile its expert,
    or -1. With begin = start / TILE + e, both rounded down, tile begin + i has the pairs of expert
    e from start + i * TILE on: so every expert has tiles enough, and knows without the others
    which they are. A block for each expert; each thread has a stretch of the pairs.
    """

    @T.macro
    def order_pairs(experts: T.handle, order: T.handle, plan: T.handle, n: T.int32) -> None:
        for e in T.thread_binding(num_experts, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                before = T.alloc_buffer((THREADS,), "int32", scope="shared")
                equal = T.alloc_buffer((THREADS,), "int32", scope="shared")
                count = T.alloc_buffer((3,), "int32", scope="local")
                share: T.let = (n * top_k + THREADS - 1) // THREADS
                first: T.let = T.min(thread * share, n * top_k)
                end: T.let = T.min(first + share, n * top_k)
                count[0] = 0
                count[1] = 0
                for i in T.serial(end - first):
                    other: T.let = experts[(first + i) // top_k, (first + i) % top_k]
                    if other < e:
                        count[0] = count[0] + 1
                    if other == e:
                        count[1] = count[1] + 1
                before[thread] = count[0]
                equal[thread] = count[1]
                T.tvm_storage_sync("shared")
                # The expert's first place, this thread's, and the expert's end.
                count[0] = 0
                count[1] = 0
                count[2] = 0
                for i in T.serial(THREADS):
                    count[0] = count[0] + before[i]
                    count[2] = count[2] + equal[i]
                    if i < thread:
                        count[1] = count[1] + equal[i]
                count[1] = count[0] + count[1]
                count[2] = count[0] + count[2]
                if thread == 0:
                    plan[e] = count[0]
                    plan[e + 1] = count[2]
                begin: T.let = count[0] // TILE + e
                tiles: T.let = count[2] // TILE + e + 1 - begin
                for i in T.serial((tiles + THREADS - 1) // THREADS):
                    tile: T.let = i * THREADS + thread
                    if tile < tiles:
                        plan[num_experts + 1 + begin + tile] = T.if_then_else(
                            count[0] + tile * TILE < count[2], e, -1
                        )
                for i in T.serial(end - first):
                    if experts[(first + i) // top_k, (first + i) % top_k] == e:
                        order[count[1]] = first + i
                        count[1] = count[1] + 1

    @T.prim_func(private=True, s_tir=True)
    def order_by_expert_kernel(
        experts_handle: T.handle, order_handle: T.handle, plan_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n, pairs, size = T.int32(), T.int32(), T.int32()
        experts = T.match_buffer(experts_handle, (n, top_k), "int32")
        order = T.match_buffer(order_handle, (pairs,), "int32")
        plan = T.match_buffer(plan_handle, (size,), "int32")
        if n > few:
            order_pairs(experts, order, plan, n)

    return order_by_expert_kernel


def weigh(n: RowCount, top_k: int, width: int, dtype: str) -> Any:
    """Weigh: y (pairs, width), weights (n, top_k) float32 -> y, every row times its weight."""
    y, weights = _pairs(n, top_k, width, dtype), _choices(n, top_k, "float32")

    def item(p: Any, c: Any) -> Any:
        return narrow(wide(y[p, c]) * weights[p // top_k, p % top_k], dtype)

    return computation([y, weights, compute(tuple(y.shape), item, name="out")])


def mix(n: RowCount, top_k: int, width: int, dtype: str, is_weighted: bool = True) -> Any:
    """Mix: y (pairs, width), weights (n, top_k) float32 -> (n, width), the weighted sums of each
    token's rows, in the order of its choices. If not is_weighted, rows have their weights already.
    """
    y, weights = _pairs(n, top_k, width, dtype), _choices(n, top_k, "float32")

    def item(t: Any, c: Any) -> Any:
        total = constant(0)
        for j in range(top_k):
            row = wide(y[t * top_k + j, c])
            total = total + (row * weights[t, j] if is_weighted else row)
        return narrow(total, dtype)

    return computation([y, weights, compute((weights.shape[0], width), item, name="out")])


def scale_by_sigmoid(n: RowCount, width: int, dtype: str) -> Any:
    """Scale rows: x (n, width), logits (n, 1) -> x * sigmoid(logits)."""
    rows = num_rows(n)
    x, logits = tensor("x", (rows, width), dtype), tensor("logits", (rows, 1), dtype)

    def item(t: Any, c: Any) -> Any:
        return narrow(wide(x[t, c]) / (constant(1) + tirx.exp(-wide(logits[t, 0]))), dtype)

    return computation([x, logits, compute((rows, width), item, name="out")])


def add_expert_bias(n: RowCount, num_experts: int, top_k: int, width: int, dtype: str) -> Any:
    """Add: y (pairs, width), experts (n, top_k) int32, bias (experts, width)
    -> y plus the bias of each pair's expert.
    """
    y, chosen = _pairs(n, top_k, width, dtype), _choices(n, top_k, "int32")
    bias = tensor("bias", (num_experts, width), dtype)

    def item(p: Any, c: Any) -> Any:
        return narrow(wide(y[p, c]) + wide(bias[chosen[p // top_k, p % top_k], c]), dtype)

    return computation([y, chosen, bias, compute(tuple(y.shape), item, name="out")])


def _pairs(n: RowCount, top_k: int, width: int, dtype: str) -> Any:
    pairs = te.var("pairs", "int64") if n is None else n * top_k
    return tensor("y", (pairs, width), dtype)


def _choices(n: RowCount, top_k: int, dtype: str) -> Any:
    return tensor("of_pairs", (num_rows(n), top_k), dtype)
