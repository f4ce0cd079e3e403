"""Sorting of rows, the largest item first: runs of a block's items, then merges of neighbours.

What is equal keeps its order. Threads are bound by hand.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

# Threads of a block, and items of the first runs.
RUN = 256


def sort_runs(width: int) -> Any:
    """Sort runs of RUN items: x (b, width) float32 -> items (b, width), where they were, int32.

    An item's place is the number of items of its run that go before it.
    """
    blocks = -(-width // RUN)

    @T.prim_func(private=True, s_tir=True)
    def sort_runs_kernel(x_handle: T.handle, out_handle: T.handle, order_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        x = T.match_buffer(x_handle, (b, width), "float32")
        out = T.match_buffer(out_handle, (b, width), "float32")
        order = T.match_buffer(order_handle, (b, width), "int32")
        for block in T.thread_binding(b * blocks, thread="blockIdx.x"):
            for thread in T.thread_binding(RUN, thread="threadIdx.x"):
                items = T.alloc_buffer((RUN,), "float32", scope="shared")
                mine = T.alloc_buffer((1,), "float32", scope="local")
                other = T.alloc_buffer((1,), "float32", scope="local")
                rank = T.alloc_buffer((1,), "int32", scope="local")
                start: T.let = block % blocks * RUN
                mine[0] = T.float32(0)
                if start + thread < width:
                    mine[0] = x[block // blocks, start + thread]
                items[thread] = mine[0]
                T.tvm_storage_sync("shared")
                rank[0] = 0
                for i in T.serial(RUN):
                    other[0] = items[i]
                    if start + i < width and (
                        other[0] > mine[0] or (other[0] == mine[0] and i < thread)
                    ):
                        rank[0] = rank[0] + 1
                if start + thread < width:
                    out[block // blocks, start + rank[0]] = mine[0]
                    order[block // blocks, start + rank[0]] = start + thread

    return sort_runs_kernel


def merge_runs(width: int, run: int) -> Any:
    """Merge neighbours of sorted runs of `run` items: x (b, width) float32, order (b, width) int32
    -> the same, in runs of 2 * run.

    An item moves by the number of items of the other run that go before it.
    """
    blocks, steps = -(-width // RUN), run.bit_length()

    @T.prim_func(private=True, s_tir=True)
    def merge_runs_kernel(
        x_handle: T.handle, order_handle: T.handle, out_handle: T.handle, merged_handle: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        b = T.int32()
        x = T.match_buffer(x_handle, (b, width), "float32")
        order = T.match_buffer(order_handle, (b, width), "int32")
        out = T.match_buffer(out_handle, (b, width), "float32")
        merged = T.match_buffer(merged_handle, (b, width), "int32")
        for block in T.thread_binding(b * blocks, thread="blockIdx.x"):
            for thread in T.thread_binding(RUN, thread="threadIdx.x"):
                low = T.alloc_buffer((1,), "int32", scope="local")
                high = T.alloc_buffer((1,), "int32", scope="local")
                row: T.let = block // blocks
                i: T.let = block % blocks * RUN + thread
                base: T.let = i // (2 * run) * (2 * run)
                is_first: T.let = i < base + run
                other: T.let = T.if_then_else(is_first, base + run, base)
                if i < width:
                    # The items before `low` go before x[i], those from `high` on do not.
                    low[0] = T.min(other, width)
                    high[0] = T.min(other + run, width)
                    for _step in T.serial(steps):
                        if low[0] < high[0]:
                            middle: T.let = (low[0] + high[0]) // 2
                            if x[row, middle] > x[row, i] or (
                                x[row, middle] == x[row, i] and not is_first
                            ):
                                low[0] = middle + 1
                            else:
                                high[0] = middle
                    place: T.let = T.if_then_else(
                        is_first, i + low[0] - T.min(other, width), i - run + low[0] - other
                    )
                    out[row, place] = x[row, i]
                    merged[row, place] = order[row, i]

    return merge_runs_kernel
