"""Attention of tiles of tokens on tensor cores: `attention_tile` for NVIDIA's GPUs and pages of
float16.

A block is for some tokens of one sequence and a KV head; each of its warps has rows of queries of
its own, in registers, as scores, weights and results are. Only keys and values, block by block, are
in shared memory: values arrive while scores are made, the next keys while values are weighed.
Blocks of keys begin at multiples of their size, so that what a token sums does not depend on its
tile. Scores, sums and results are float32, weights are rounded to float16 (Dao 2023,
FlashAttention-2, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu.attention_pages import first_key, is_visible
from mlc_llm.kernels.gpu.attention_scores import MASKED, finish_score, with_sink
from mlc_llm.kernels.gpu.tensor_cores import (
    LEFT,
    RIGHT,
    SUM,
    WARP,
    TensorCores,
    pair_place,
    pair_place_of_rows,
)

# What a matrix of queries or weights has: rows, and items of each. Others have half the columns.
_TILE = 16
_WARPS = 4
_VECTOR = 8  # items of float16 in 16 bytes
# Below all scores and far above what masked ones are: powers of those below it are 0.
_LOWEST = MASKED / 2


@dataclass(frozen=True)
class WarpGrid:
    """How a block is laid out: `rows` of queries against `keys` at a time; `tokens` of `heads`
    heads each make up the rows, the last ones may be unused.
    """

    keys: int
    heads: int
    head_blocks: int
    stride: int

    @property
    def rows(self) -> int:
        """Return the rows of a tile."""
        return _WARPS * _TILE

    @property
    def tokens(self) -> int:
        """Return the tokens of a tile."""
        return self.rows // self.heads

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return _WARPS * WARP


def fits_tensor_cores(shape: AttentionShape, dtype: str, cores: TensorCores) -> bool:
    """Return whether this schedule can be taken for a shape."""
    # Queries in bfloat16 lose nothing as float16, unless they are out of all proportion.
    if shape.kv_dtype != "float16" or dtype not in ("float16", "bfloat16"):
        return False
    if shape.head_dim > cores.max_head_dim:
        return False
    grid = warp_grid(shape, cores)
    return (
        shape.head_dim % _TILE == 0 and grid.keys * shape.head_dim % (grid.threads * _VECTOR) == 0
    )


def warp_grid(shape: AttentionShape, cores: TensorCores) -> WarpGrid:
    """Return the layout for a shape."""
    rows = _WARPS * _TILE
    head_blocks = -(-shape.group // rows)
    # Keys and values of a block take at most 34 KiB. A stride that is an odd number of vectors puts
    # eight rows in banks of their own.
    keys = 64 if shape.head_dim <= cores.max_head_dim // 2 else 32
    return WarpGrid(keys, -(-shape.group // head_blocks), head_blocks, shape.head_dim + _VECTOR)


def tensor_steps(
    shape: AttentionShape, dtype: str, sink_dtype: str | None, cores: TensorCores
) -> Any:
    """Return a macro that launches the kernel: attend(q, pages, query_start, page_table, positions,
    sink_logits, out, n, batch).
    """
    grid = warp_grid(shape, cores)
    group, kv_heads, head_dim = shape.group, shape.num_kv_heads, shape.head_dim
    page_size, keys, heads, head_blocks = shape.page_size, grid.keys, grid.heads, grid.head_blocks
    tokens, threads, stride = grid.tokens, grid.threads, grid.stride
    vectors, deep, key_tiles = head_dim // _VECTOR, head_dim // _TILE, keys // _TILE
    copies = keys * vectors // threads

    def block_at(index: Any, window_block: Any, sink_blocks: Any) -> Any:
        """Return the number of the index-th block that a tile needs."""
        if shape.sinks <= 0:
            return index + window_block
        return T.if_then_else(index < sink_blocks, index, index - sink_blocks + window_block)

    def place_in(row_and_item: tuple[Any, Any]) -> Any:
        """Return a place in shared memory."""
        return row_and_item[0] * stride + row_and_item[1]

    def sees_all(start: Any, first_position: Any, last_position: Any) -> Any:
        """Return whether all tokens of a tile see all keys of a block."""
        seen = start + keys - 1 <= first_position
        if shape.window <= 0:
            return seen
        return T.And(seen, start >= first_key(shape, last_position))

    @T.macro
    def copy(
        pages: T.handle,
        page_table: T.handle,
        block_items: T.handle,
        s: T.int32,
        side: T.meta_var,
        kv_head: T.int32,
        start: T.int32,
        last: T.int32,
        thread: T.int32,
    ) -> None:
        """Begin to copy the items of a block of keys; those past the last repeat it."""
        for i in T.unroll(copies):
            at: T.let = i * threads + thread
            key: T.let = T.min(start + at // vectors, last)
            T.evaluate(
                cores.copy(
                    block_items,
                    at // vectors * stride + at % vectors * _VECTOR,
                    pages[
                        page_table[s, key // page_size],
                        side,
                        kv_head,
                        key % page_size * head_dim + at % vectors * _VECTOR,
                    ],
                )
            )

    @T.macro
    def attend(
        q: T.handle,
        pages: T.handle,
        query_start: T.handle,
        page_table: T.handle,
        positions: T.handle,
        sink_logits: T.handle,
        out: T.handle,
        n: T.int32,
        batch: T.int32,
    ) -> None:
        for bx in T.thread_binding(n // tokens + batch, thread="blockIdx.x"):
            for by in T.thread_binding(kv_heads * head_blocks, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    k_items = T.alloc_buffer((keys * stride,), "float16", scope="shared")
                    v_items = T.alloc_buffer((keys * stride,), "float16", scope="shared")
                    queries = T.alloc_buffer((deep * LEFT,), "float16", scope="local")
                    weights = T.alloc_buffer((LEFT,), "float16", scope="local")
                    pair = T.alloc_buffer((2 * RIGHT,), "float16", scope="local")
                    score = T.alloc_buffer((2 * key_tiles * SUM,), "float32", scope="local")
                    acc = T.alloc_buffer((2 * deep * SUM,), "float32", scope="local")
                    # Of the thread's two rows: positions, largest scores, sums of powers.
                    place = T.alloc_buffer((2,), "int32", scope="local")
                    best = T.alloc_buffer((2,), "float32", scope="local")
                    total = T.alloc_buffer((2,), "float32", scope="local")
                    change = T.alloc_buffer((1,), "float32", scope="local")
                    bound = T.alloc_buffer((2,), "int32", scope="local")
                    kept = T.alloc_buffer((6,), "int32", scope="local")
                    # Later tokens see more keys: their tiles begin first.
                    tile: T.let = n // tokens + batch - 1 - bx
                    # The blocks of sequence s begin with number query_start[s] // tokens + s.
                    bound[0] = 0
                    bound[1] = batch - 1
                    for _step in T.serial(24):
                        if bound[0] < bound[1]:
                            middle: T.let = (bound[0] + bound[1] + 1) // 2
                            if query_start[middle] // tokens + middle <= tile:
                                bound[0] = middle
                            else:
                                bound[1] = middle - 1
                    s: T.let = bound[0]
                    # What is read from memory is not written out again at each use, as sums are.
                    kept[0] = query_start[s] + (tile - query_start[s] // tokens - s) * tokens
                    first: T.let = kept[0]
                    kept[1] = T.min(query_start[s + 1] - first, tokens)
                    count: T.let = kept[1]
                    kv_head: T.let = by // head_blocks
                    first_head: T.let = kv_head * group + by % head_blocks * heads
                    lane: T.let = thread % WARP
                    row: T.let = thread // WARP * _TILE + lane // 4  # and the eighth after it
                    k_place: T.let = place_in(pair_place(lane))
                    v_place: T.let = place_in(pair_place_of_rows(lane))
                    if count > 0:
                        kept[2] = positions[first]
                        first_position: T.let = kept[2]
                        kept[3] = positions[first + count - 1]
                        last: T.let = kept[3]
                        window_block: T.let = first_key(shape, first_position) // keys
                        sink_blocks: T.let = T.min((shape.sinks + keys - 1) // keys, window_block)
                        num_blocks: T.let = sink_blocks + last // keys - window_block + 1
                        for i in T.unroll(2):
                            token: T.let = first + T.min((row + i * 8) // heads, count - 1)
                            head: T.let = T.min(
                                first_head + (row + i * 8) % heads, shape.num_heads - 1
                            )
                            place[i] = positions[token]
                            best[i] = T.float32(_LOWEST)
                            total[i] = T.float32(0)
                            for d in T.unroll(2 * deep):
                                for v in T.vectorized(2):
                                    queries[(d * 2 + i) * 2 + v] = T.Cast(
                                        "float16",
                                        T.Cast("float32", q[token, head, d * 8 + lane % 4 * 2 + v]),
                                    )
                        for i in T.unroll(2 * deep * SUM):
                            acc[i] = T.float32(0)
                        copy(
                            *(pages, page_table, k_items, s, 0, kv_head),
                            *(block_at(0, window_block, sink_blocks) * keys, last, thread),
                        )
                        for block in T.serial(num_blocks):
                            kept[4] = block_at(block, window_block, sink_blocks) * keys
                            start: T.let = kept[4]
                            T.evaluate(cores.wait())
                            T.tvm_storage_sync("shared")
                            copy(
                                *(pages, page_table, v_items, s, 1, kv_head),
                                *(start, last, thread),
                            )
                            for i in T.unroll(2 * key_tiles * SUM):
                                score[i] = T.float32(0)
                            for d in T.unroll(deep):
                                for j in T.unroll(key_tiles):
                                    T.evaluate(
                                        cores.load_pair(
                                            pair,
                                            k_items,
                                            k_place + j * _TILE * stride + d * _TILE,
                                        )
                                    )
                                    for i in T.unroll(2):
                                        T.evaluate(
                                            cores.multiply(
                                                *(score, (2 * j + i) * SUM, queries, d * LEFT),
                                                *(pair, i * RIGHT),
                                            )
                                        )
                            for i in T.unroll(2 * key_tiles * SUM):
                                score[i] = finish_score(
                                    shape,
                                    score[i],
                                    first_head + (row + i // 2 % 2 * 8) % heads,
                                    start + i // SUM * 8 + lane % 4 * 2 + i % 2,
                                    place[i // 2 % 2],
                                )
                            if not sees_all(start, first_position, last):
                                for i in T.unroll(2 * key_tiles * SUM):
                                    score[i] = T.Select(
                                        is_visible(
                                            shape,
                                            start + i // SUM * 8 + lane % 4 * 2 + i % 2,
                                            place[i // 2 % 2],
                                        ),
                                        score[i],
                                        T.float32(MASKED),
                                    )
                            for i in T.unroll(2):
                                change[0] = best[i]
                                for j in T.unroll(2 * key_tiles):
                                    for v in T.unroll(2):
                                        best[i] = T.max(best[i], score[j * SUM + i * 2 + v])
                                best[i] = cores.quad_max(best[i])
                                change[0] = T.exp2(change[0] - best[i])
                                total[i] = total[i] * change[0]
                                for j in T.unroll(2 * deep):
                                    for v in T.unroll(2):
                                        acc[j * SUM + i * 2 + v] = (
                                            acc[j * SUM + i * 2 + v] * change[0]
                                        )
                                for j in T.unroll(2 * key_tiles):
                                    for v in T.unroll(2):
                                        score[j * SUM + i * 2 + v] = T.exp2(
                                            score[j * SUM + i * 2 + v] - best[i]
                                        )
                                        total[i] = total[i] + score[j * SUM + i * 2 + v]
                            T.evaluate(cores.wait())
                            T.tvm_storage_sync("shared")
                            if block + 1 < num_blocks:
                                copy(
                                    *(pages, page_table, k_items, s, 0, kv_head),
                                    block_at(block + 1, window_block, sink_blocks) * keys,
                                    *(last, thread),
                                )
                            for j in T.unroll(key_tiles):
                                for i in T.unroll(LEFT):
                                    weights[i] = T.Cast("float16", score[j * LEFT + i])
                                for d in T.unroll(deep):
                                    T.evaluate(
                                        cores.load_pair_of_rows(
                                            pair,
                                            v_items,
                                            v_place + j * _TILE * stride + d * _TILE,
                                        )
                                    )
                                    for i in T.unroll(2):
                                        T.evaluate(
                                            cores.multiply(
                                                *(acc, (2 * d + i) * SUM, weights, 0),
                                                *(pair, i * RIGHT),
                                            )
                                        )
                        for i in T.unroll(2):
                            total[i] = cores.quad_sum(total[i])
                            own_row: T.let = row + i * 8
                            own_head: T.let = first_head + own_row % heads
                            if (
                                own_row // heads < count
                                and by % head_blocks * heads + own_row % heads < group
                            ):
                                change[0] = T.float32(1) / with_sink(
                                    total[i], best[i], sink_logits, own_head, sink_dtype
                                )
                                for j in T.unroll(2 * deep):
                                    for v in T.vectorized(2):
                                        out[
                                            first + own_row // heads,
                                            own_head * head_dim + j * 8 + lane % 4 * 2 + v,
                                        ] = T.Cast(dtype, acc[j * SUM + i * 2 + v] * change[0])

    return attend
