"""Linear layers and embeddings on unquantized weights, with float32 activations.

Packed layout: (ceil(out / 16), in, 16), 16 output rows interleaved, so that one vector of weights
meets one broadcast activation. Rows past `out` are zero. The sum over `in` runs in order, whatever
the number of tokens, so that a token's result does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import LANES, lane_dtype, multiply_add, span, splat

# Rows of activations that share one load of weights, where registers have 16 lanes and elsewhere.
ROWS, FEW_ROWS = 8, 4


def num_blocks(out_features: int) -> int:
    """Return the number of 16-row blocks that hold `out_features` rows."""
    return -(-out_features // LANES)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Return the packed shape of an (out, in) weight."""
    return (num_blocks(out_features), in_features, LANES)


@dataclass(frozen=True)
class TileRows:
    """The rows of a tile of a matrix product, as functions of their place in the tile.

    A macro of a tile gets one of these, so that tokens in order and tokens sorted by expert share
    the arithmetic. bias(start, lanes) is the float32 bias of outputs from `start` on.
    """

    source: Callable[[Any], Any]  # row of the activations
    target: Callable[[Any], Any]  # row of the result
    exists: Callable[[Any], Any]  # false where the tile is longer than what is left
    bias: Callable[[Any, int], Any] | None = None

    @property
    def has_bias(self) -> bool:
        """Return whether outputs have a bias."""
        return self.bias is not None


def rows_in_order(first: Any, n: Any, bias: Callable[[Any, int], Any] | None = None) -> TileRows:
    """Return the rows from `first` on, of n in all."""
    return TileRows(
        lambda i: T.min(first + i, n - 1), lambda i: first + i, lambda i: first + i < n, bias
    )


def padded_rows(first: Any, n: Any, bias: Callable[[Any, int], Any] | None = None) -> TileRows:
    """Return the rows from `first` on, of n in all, where activations go on to the tile's end."""
    return TileRows(lambda i: first + i, lambda i: first + i, lambda i: first + i < n, bias)


def bias_of(buffer: Any) -> Callable[[Any, int], Any]:
    """Return a function from an output and a number of lanes to the bias of these outputs."""
    return lambda start, lanes: T.Cast(lane_dtype("float32", lanes), buffer[span(start, lanes)])


def portable_array(
    rows: int, columns: int, is_transposed: bool, experts: int | None
) -> tuple[tuple[int, ...], Callable[[Any, Any, Any, Any], Any]]:
    """Return the shape of what `interleave` packs, and a function from such an array, an expert, a
    row and a column to its value there.
    """
    matrix = (columns, rows) if is_transposed else (rows, columns)
    shape = matrix if experts is None else (experts, *matrix)

    def value_of(source: Any, expert: Any, row: Any, column: Any) -> Any:
        place = (column, row) if is_transposed else (row, column)
        return source[place if experts is None else (expert, *place)]

    return shape, value_of


def interleave(
    rows: int, columns: int, dtype: str, is_transposed: bool, experts: int | None = None
) -> Any:
    """Pack an array: (rows, columns), or (columns, rows) if transposed
    -> (ceil(rows / 16), columns, 16), rows past the end zero.

    With experts the array has another dimension, its first, and blocks of an expert follow those
    of the one before.
    """
    blocks, count = num_blocks(rows), experts or 1
    shape, value_of = portable_array(rows, columns, is_transposed, experts)

    @T.prim_func(private=True, s_tir=True)
    def interleave_kernel(
        source: T.Buffer(shape, dtype),
        packed: T.Buffer((count * blocks, columns, LANES), dtype),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(count * blocks):
            for c in T.serial(columns):
                for v in T.serial(LANES):
                    if b % blocks * LANES + v < rows:
                        packed[b, c, v] = value_of(source, b // blocks, b % blocks * LANES + v, c)
                    else:
                        packed[b, c, v] = T.Cast(dtype, 0)

    return interleave_kernel


def matmul_tile(in_features: int, out_features: int) -> Any:
    """Return a macro: a tile of `count` rows on one block of 16 outputs.

    Its arguments: x, packed weight, result, `TileRows`, block of the weight, block of the outputs,
    count.
    """
    vector = f"float32x{LANES}"

    @T.macro
    def tile(
        x: T.handle,
        packed: T.handle,
        out: T.handle,
        at: T.meta_var,
        block: T.int32,
        b: T.int32,
        count: T.meta_var,
    ) -> None:
        acc = T.alloc_buffer((count, LANES), "float32")
        for i in T.unroll(count):
            acc[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for k in T.serial(in_features):
            for i in T.unroll(count):
                acc[i, T.ramp(0, 1, LANES)] = multiply_add(
                    splat(x[at.source(i), k]),
                    T.Cast(vector, packed[block, k, T.ramp(0, 1, LANES)]),
                    acc[i, T.ramp(0, 1, LANES)],
                )
        store_rows(out, acc, at, b, count, out_features)

    return tile


def matmul(
    out_features: int, in_features: int, dtype: str, has_bias: bool, rows: int = ROWS
) -> Any:
    """Multiply: x (n, in) float32, packed weight[, bias (out)] -> (n, out) float32.

    rows: how many share a load of weights; their sums should fit into registers.
    """
    blocks = num_blocks(out_features)
    tile = matmul_tile(in_features, out_features)

    @T.macro
    def all_tiles(
        x: T.handle, packed: T.handle, bias: T.meta_var, out: T.handle, n: T.int32
    ) -> None:
        if n == 1:
            for b in T.parallel(blocks):
                tile(x, packed, out, rows_in_order(0, n, bias), b, b, 1)
        else:
            for b in T.parallel(blocks):
                for m in T.serial((n + rows - 1) // rows):
                    tile(x, packed, out, rows_in_order(m * rows, n, bias), b, b, rows)

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def matmul_bias_kernel(
            x_handle: T.handle,
            packed: T.Buffer((blocks, in_features, LANES), dtype),
            bias: T.Buffer((out_features,), dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            x = T.match_buffer(x_handle, (n, in_features), "float32")
            out = T.match_buffer(out_handle, (n, out_features), "float32")
            all_tiles(x, packed, bias_of(bias), out, n)

        return matmul_bias_kernel

    @T.prim_func(private=True, s_tir=True)
    def matmul_kernel(
        x_handle: T.handle,
        packed: T.Buffer((blocks, in_features, LANES), dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, in_features), "float32")
        out = T.match_buffer(out_handle, (n, out_features), "float32")
        all_tiles(x, packed, None, out, n)

    return matmul_kernel


@T.macro
def store_rows(
    out: T.handle,
    acc: T.handle,
    at: T.meta_var,
    b: T.int32,
    rows: T.meta_var,
    out_features: T.meta_var,
) -> None:
    """Write accumulators of one tile, adding the bias and leaving out rows past the end."""
    for i in T.unroll(rows):
        if at.exists(i):
            for v in T.serial(LANES):
                if b * LANES + v < out_features:
                    if at.has_bias:
                        out[at.target(i), b * LANES + v] = acc[i, v] + at.bias(b * LANES + v, 1)
                    else:
                        out[at.target(i), b * LANES + v] = acc[i, v]


def embed(num_embeddings: int, features: int, dtype: str) -> Any:
    """Look rows up in a packed table: ids (n) int32 -> (n, features) float32."""
    blocks = num_blocks(num_embeddings)

    @T.prim_func(private=True, s_tir=True)
    def embed_kernel(
        ids_handle: T.handle,
        packed: T.Buffer((blocks, features, LANES), dtype),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        ids = T.match_buffer(ids_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, features), "float32")
        for t in T.serial(n):
            for k in T.serial(features):
                out[t, k] = T.Cast("float32", packed[ids[t] // LANES, k, ids[t] % LANES])

    return embed_kernel
