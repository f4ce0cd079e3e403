"""Products of few rows with weights, by threads that share the sum of an output.

A block has two groups of `lanes` threads. A thread of a group has pieces of the same four outputs:
what makes up a weight is read once, taken apart once, and multiplied with every row.

              k: lane 0 | lane 1 | ... | lane 0 | ...
    output 0    piece     piece          piece        group 0
    output 1    piece     piece          piece
    ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.gpu.product import Pieces, Product, find_pieces

# Outputs of a thread, and groups of threads in a block: eight outputs a block, so that 4,096 of
# them keep GPUs of 132 multiprocessors busy.
_OUTPUTS, _GROUPS = 4, 2
_MAX_LANES = 128
# Weights that are read at once: of formats whose words have 4, 8 or 16 codes, and 10.
_LENGTHS = (32, 16, 8, 4, 2, 1, 40, 20, 10)
# A thread's shortest loads are of so many weights, where their form allows it.
_USUAL_LENGTH = 8


@dataclass(frozen=True)
class FewRowsGrid:
    """How a kernel is laid out: `rows` at most, in `lanes` threads that share an output."""

    rows: int
    lanes: int
    pieces: Pieces
    load_bytes: int

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return _GROUPS * self.lanes

    @property
    def depth(self) -> int:
        """Return how many weights of an output are multiplied between two reads of rows."""
        length = self.pieces.length
        return 5 if length % 5 == 0 else math.gcd(length, 4)


def few_rows_grid(product: Product, rows: int, load_bytes: int) -> FewRowsGrid | None:
    """Return the layout for so many rows, a power of two; None where weights have other forms."""
    found = [find_pieces(product, length, load_bytes) for length in _LENGTHS]
    fitting = [pieces for pieces in found if pieces is not None]
    if not fitting:
        return None

    def num_pieces(pieces: Pieces) -> int:
        return -(-product.in_features // pieces.length)

    # The longest of which every thread has two, that there is something to read while it computes.
    long = [pieces for pieces in fitting if num_pieces(pieces) >= 2 * _MAX_LANES]
    usual = [pieces for pieces in fitting if pieces.length >= _USUAL_LENGTH]
    if long:
        pieces = max(long, key=lambda pieces: pieces.length)
    else:
        pieces = min(usual or fitting, key=lambda pieces: pieces.length)
    lanes = _MAX_LANES
    while lanes > max(rows, num_pieces(pieces)):
        lanes //= 2
    return FewRowsGrid(rows, max(lanes, rows), pieces, load_bytes)


def few_rows_product(product: Product, grid: FewRowsGrid) -> Any:
    """Return the statement that launches the kernel; further rows have blocks of their own."""
    x, out, n = product.x, product.out, product.num_rows
    rows, lanes, threads, depth = grid.rows, grid.lanes, grid.threads, grid.depth
    pieces, length = grid.pieces, grid.pieces.length
    in_features, out_features = product.in_features, product.out_features
    num_pieces = -(-in_features // length)
    num_steps = -(-num_pieces // lanes)
    is_full = in_features % length == 0
    codes = pieces.operands[0]
    scales = pieces.operands[1] if len(pieces.operands) > 1 else codes
    outputs, blocks = _OUTPUTS, -(-out_features // (_GROUPS * _OUTPUTS))
    x_lanes = math.gcd(depth, grid.load_bytes // (4 if x.dtype == "float32" else 2))
    if not is_full or in_features % x_lanes:
        x_lanes = 1
    # Outputs lie side by side where pieces do not: then their threads do, too.
    is_across = codes.axis == 0
    sums_at_once = rows * _GROUPS
    adders = threads // sums_at_once  # threads that add up one sum
    stride = lanes + adders  # so that they read different banks of memory

    def weight_at(j: Any, words: Any, factors: Any, s: Any) -> Any:
        kept = [words, factors][: len(pieces.operands)]
        return T.Cast("float32", pieces.weight(j, kept, s))

    def x_at(row: Any, k: Any) -> Any:
        """Return an item of a row, 0 past its end."""
        if is_full:
            return x[row, k]
        return T.if_then_else(
            k < in_features, x[row, T.min(k, in_features - 1)], T.Cast(x.dtype, 0)
        )

    @T.macro
    def load(
        kept: T.handle,
        operand: T.meta_var,
        s: T.int64,
        column_of: T.handle,
        piece: T.int64,
    ) -> None:
        """Read what a piece of weights of output s is made of."""
        for v in T.unroll(T.int64(operand.count // operand.lanes)):
            for u in T.vectorized(T.int64(operand.lanes)):
                kept[s * operand.count + v * operand.lanes + u] = operand.item(
                    T.Cast("int64", column_of[s]), piece, v * operand.lanes + u
                )

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def launch() -> None:
        # Blocks of the same weights are neighbours, so that the second reads them from the cache.
        for chunk in T.thread_binding((n + (rows - 1)) // rows, thread="blockIdx.x"):
            for block in T.thread_binding(T.int64(blocks), thread="blockIdx.y"):
                for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                    words = T.alloc_buffer(
                        (outputs * codes.count,), codes.tensor.dtype, scope="local"
                    )
                    factors = T.alloc_buffer(
                        (outputs * scales.count,), scales.tensor.dtype, scope="local"
                    )
                    weights = T.alloc_buffer((outputs * depth,), "float32", scope="local")
                    items = T.alloc_buffer((depth,), x.dtype, scope="local")
                    sums = T.alloc_buffer((rows * outputs,), "float32", scope="local")
                    shares = T.alloc_buffer((sums_at_once * stride,), "float32", scope="shared")
                    parts = T.alloc_buffer((threads,), "float32", scope="shared")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    # What is kept in memory is not written out again at each use.
                    row_of = T.alloc_buffer((rows,), "int32", scope="local")
                    column_of = T.alloc_buffer((outputs,), "int32", scope="local")
                    lane: T.let = thread // _GROUPS if is_across else thread % lanes
                    group: T.let = thread % _GROUPS if is_across else thread // lanes
                    # Rows and outputs past the last repeat it.
                    for r in T.unroll(rows):
                        row_of[r] = T.Cast("int32", T.min(chunk * rows + r, n - 1))
                    for s in T.unroll(outputs):
                        column_of[s] = T.Cast(
                            "int32",
                            T.min((block * _GROUPS + group) * outputs + s, out_features - 1),
                        )
                    for i in T.unroll(rows * outputs):
                        sums[i] = T.float32(0)
                    for step in T.serial(T.int64(num_steps)):
                        piece: T.let = step * lanes + lane
                        if piece < num_pieces:
                            for s in T.unroll(T.int64(outputs)):
                                load(words, codes, s, column_of, piece)
                                if len(pieces.operands) > 1:
                                    load(factors, scales, s, column_of, piece)
                            for part in T.unroll(T.int64(length // depth)):
                                for s in T.unroll(T.int64(outputs)):
                                    for j in T.unroll(T.int64(depth)):
                                        weights[s * depth + j] = weight_at(
                                            part * depth + j, words, factors, s
                                        )
                                for r in T.unroll(T.int64(rows)):
                                    for v in T.unroll(T.int64(depth // x_lanes)):
                                        for u in T.vectorized(T.int64(x_lanes)):
                                            items[v * x_lanes + u] = x_at(
                                                T.Cast("int64", row_of[r]),
                                                piece * length + part * depth + v * x_lanes + u,
                                            )
                                    for s in T.unroll(T.int64(outputs)):
                                        for j in T.unroll(T.int64(depth)):
                                            sums[r * outputs + s] = sums[r * outputs + s] + weights[
                                                s * depth + j
                                            ] * T.Cast("float32", items[j])
                    # The threads' shares, for one output of each group at a time.
                    for s in T.unroll(outputs):
                        for r in T.unroll(rows):
                            shares[(r * _GROUPS + group) * stride + lane] = sums[r * outputs + s]
                        T.tvm_storage_sync("shared")
                        total[0] = T.float32(0)
                        for t in T.unroll(lanes // adders):
                            total[0] = (
                                total[0]
                                + shares[thread // adders * stride + t * adders + thread % adders]
                            )
                        parts[thread] = total[0]
                        T.tvm_storage_sync("shared")
                        if thread < sums_at_once:
                            total[0] = T.float32(0)
                            for t in T.unroll(adders):
                                total[0] = total[0] + parts[thread * adders + t]
                            row: T.let = chunk * rows + thread // _GROUPS
                            column: T.let = (block * _GROUPS + thread % _GROUPS) * outputs + s
                            if row < n:
                                if column < out_features:
                                    out[row, column] = product.finish(row, column, total[0])

    return launch.body
