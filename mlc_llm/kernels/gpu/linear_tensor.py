"""Products of up to 64 rows with weights on tensor cores: `linear_few` for NVIDIA's and float16.

A block has 16 or 32 outputs, each of its warps every eighth chunk of their inputs. Weights are
matrices of outputs by inputs, in registers as soon as they are read and taken apart; rows are the
columns of the other matrices. Which input is in which column of a matrix is of no matter to a sum,
so that each thread takes those that it reads in a row:

    outputs \\ inputs   place 0: a piece | place 1 | place 2 | place 3 | the next warp's ...
    group 0, group 8
    group 1, group 9
    ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.gpu.product import Pieces, Product, find_pieces
from mlc_llm.kernels.gpu.tensor_cores import LEFT, RIGHT, SUM, WARP, TensorCores

# Threads of a warp that share the outputs of a matrix, and its rows: outputs, columns: of rows.
_PLACES, _OUTPUTS, _ROWS = 4, 16, 8
_WARPS = 8
_LENGTHS = (32, 16, 8)
_VECTOR = 8  # items of float16 in 16 bytes
# From so many blocks on a warp may have twice the outputs, and reads rows half as often.
_ENOUGH_BLOCKS = 528
# A stride of sums that puts rows of two places in banks of their own.
_PADDING = 4


@dataclass(frozen=True)
class TensorGrid:
    """How a kernel is laid out: `rows` at most, `matrices` of outputs a warp, `warps` a block."""

    rows: int
    matrices: int
    warps: int
    pieces: Pieces

    @property
    def outputs(self) -> int:
        """Return the outputs of a block."""
        return self.matrices * _OUTPUTS


def tensor_grid(product: Product, rows: int) -> TensorGrid | None:
    """Return the layout for so many rows, None where weights have other forms."""
    if not product.x.dtype == product.weight_dtype == "float16":
        return None
    found = [
        find_pieces(product, length, load_bytes=16)
        for length in _LENGTHS
        if product.in_features % (length * _PLACES) == 0
    ]
    fitting = [pieces for pieces in found if pieces is not None]
    if not fitting:
        return None

    def num_chunks(pieces: Pieces) -> int:
        return product.in_features // (pieces.length * _PLACES)

    # The longest of which every warp has two, that there is something to read while it computes.
    long = [pieces for pieces in fitting if num_chunks(pieces) >= 2 * _WARPS]
    pieces = long[0] if long else fitting[-1]
    is_wide = rows > _ROWS and product.out_features >= 2 * _OUTPUTS * _ENOUGH_BLOCKS
    warps = min(_WARPS, num_chunks(pieces))
    return TensorGrid(rows, 2 if is_wide else 1, warps, pieces)


def tensor_product(product: Product, grid: TensorGrid, cores: TensorCores) -> Any:
    """Return the statement that launches the kernel."""
    x, out, n = product.x, product.out, product.num_rows
    pieces, length, warps = grid.pieces, grid.pieces.length, grid.warps
    matrices, tiles, threads = grid.matrices, grid.rows // _ROWS, grid.warps * WARP
    out_features, outputs = product.out_features, grid.outputs
    num_chunks = product.in_features // (length * _PLACES)
    codes = pieces.operands[0]
    scales = pieces.operands[1] if len(pieces.operands) > 1 else codes
    stride = outputs + _PADDING

    def bits(value: Any) -> Any:
        return T.Cast("uint32", T.reinterpret("uint16", value))

    def pair_at(j: Any, words: Any, factors: Any, s: Any) -> Any:
        """Return the weights of the inputs j and j + 1, in the halves of a uint32."""
        kept = [words, factors][: len(pieces.operands)]
        first, second = pieces.code(j, kept, s), pieces.code(j + 1, kept, s)
        if first is None or second is None:
            low, high = (bits(pieces.weight(j + i, kept, s)) for i in range(2))
            return low | (high << T.uint32(16))
        codes = first.code | (second.code << T.uint32(16))
        scales = bits(first.scale) | (bits(second.scale) << T.uint32(16))
        return cores.weights(codes, T.uint32(first.zero * 0x10001), scales)

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
        for block in T.thread_binding(T.int64(-(-out_features // outputs)), thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                words = T.alloc_buffer(
                    (2 * matrices * codes.count,), codes.tensor.dtype, scope="local"
                )
                factors = T.alloc_buffer(
                    (2 * matrices * scales.count,), scales.tensor.dtype, scope="local"
                )
                # Two weights in each: a call of CUDA's makes both at once.
                lefts = T.alloc_buffer((matrices * LEFT,), "uint32", scope="local")
                rights = T.alloc_buffer((tiles * 2 * RIGHT,), "float16", scope="local")
                sums = T.alloc_buffer((matrices * tiles * SUM,), "float32", scope="local")
                shares = T.alloc_buffer((warps * _ROWS * stride,), "float32", scope="shared")
                total = T.alloc_buffer((1,), "float32", scope="local")
                # What is kept in memory is not written out again at each use.
                row_of = T.alloc_buffer((tiles,), "int32", scope="local")
                column_of = T.alloc_buffer((2 * matrices,), "int32", scope="local")
                warp: T.let = thread // WARP
                group: T.let = thread % WARP // _PLACES
                place: T.let = thread % _PLACES
                # Rows and outputs past the last repeat it.
                for t in T.unroll(tiles):
                    row_of[t] = T.Cast("int32", T.min(t * _ROWS + group, n - 1))
                for s in T.unroll(2 * matrices):
                    column_of[s] = T.Cast(
                        "int32",
                        T.min(block * outputs + s * (_OUTPUTS // 2) + group, out_features - 1),
                    )
                for i in T.unroll(matrices * tiles * SUM):
                    sums[i] = T.float32(0)
                for step in T.serial(T.int64(-(-num_chunks // warps))):
                    chunk: T.let = step * warps + warp
                    piece: T.let = chunk * _PLACES + place
                    if chunk < num_chunks:
                        for s in T.unroll(T.int64(2 * matrices)):
                            load(words, codes, s, column_of, piece)
                            if len(pieces.operands) > 1:
                                load(factors, scales, s, column_of, piece)
                        for part in T.unroll(T.int64(length // _VECTOR)):
                            for t in T.unroll(T.int64(tiles)):
                                for u in T.vectorized(T.int64(_VECTOR)):
                                    rights[t * _VECTOR + u] = x[
                                        T.Cast("int64", row_of[t]),
                                        piece * length + part * _VECTOR + u,
                                    ]
                            # Two matrices for each eight inputs of a thread.
                            for m in T.unroll(T.int64(matrices)):
                                for q in T.unroll(T.int64(2)):
                                    for i in T.unroll(T.int64(LEFT // 2)):
                                        lefts[(m * 2 + q) * (LEFT // 2) + i] = pair_at(
                                            part * _VECTOR + q * 4 + i // 2 * 2,
                                            words,
                                            factors,
                                            m * 2 + i % 2,
                                        )
                            for m in T.unroll(matrices):
                                for t in T.unroll(tiles):
                                    for q in T.unroll(2):
                                        T.evaluate(
                                            cores.multiply(
                                                *(sums, (m * tiles + t) * SUM),
                                                *(lefts, (m * 2 + q) * LEFT),
                                                *(rights, t * _VECTOR + q * RIGHT),
                                            )
                                        )
                # The warps' shares, eight rows at a time.
                for t in T.unroll(tiles):
                    for m in T.unroll(matrices):
                        for i in T.unroll(SUM):
                            shares[
                                (warp * _ROWS + place * 2 + i % 2) * stride
                                + m * _OUTPUTS
                                + i // 2 * 8
                                + group
                            ] = sums[(m * tiles + t) * SUM + i]
                    T.tvm_storage_sync("shared")
                    for j in T.unroll(-(-_ROWS * outputs // threads)):
                        at: T.let = j * threads + thread
                        if at < _ROWS * outputs:
                            total[0] = T.float32(0)
                            for w in T.unroll(warps):
                                total[0] = (
                                    total[0]
                                    + shares[(w * _ROWS + at // outputs) * stride + at % outputs]
                                )
                            row: T.let = t * _ROWS + at // outputs
                            column: T.let = block * outputs + at % outputs
                            if row < n:
                                if column < out_features:
                                    out[row, column] = product.finish(row, column, total[0])
                    T.tvm_storage_sync("shared")

    return launch.body
