"""Linear layers and embeddings on unquantized weights, with float32 activations.

Packed layout: (ceil(out / 16), in, 16), 16 output rows interleaved, so that one vector of weights
meets one broadcast activation. Rows past `out` are zero. The sum over `in` runs in order, whatever
the number of tokens, so that a token's result does not depend on its batch.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.vector_math import LANES, multiply_add, splat

# Rows of activations that share one load of weights, where registers have 16 lanes and elsewhere.
ROWS, FEW_ROWS = 8, 4


def num_blocks(out_features: int) -> int:
    """Return the number of 16-row blocks that hold `out_features` rows."""
    return -(-out_features // LANES)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Return the packed shape of an (out, in) weight."""
    return (num_blocks(out_features), in_features, LANES)


def interleave(rows: int, columns: int, dtype: str, is_transposed: bool) -> Any:
    """Pack an array: (rows, columns), or (columns, rows) if transposed
    -> (ceil(rows / 16), columns, 16), rows past the end zero.
    """
    blocks = num_blocks(rows)
    shape = (columns, rows) if is_transposed else (rows, columns)

    @T.prim_func(private=True, s_tir=True)
    def interleave_kernel(
        source: T.Buffer(shape, dtype),
        packed: T.Buffer((blocks, columns, LANES), dtype),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for b in T.parallel(blocks):
            for c in T.serial(columns):
                for v in T.serial(LANES):
                    if b * LANES + v < rows:
                        if is_transposed:
                            packed[b, c, v] = source[c, b * LANES + v]
                        else:
                            packed[b, c, v] = source[b * LANES + v, c]
                    else:
                        packed[b, c, v] = T.Cast(dtype, 0)

    return interleave_kernel


def matmul(
    out_features: int, in_features: int, dtype: str, has_bias: bool, rows: int = ROWS
) -> Any:
    """Multiply: x (n, in) float32, packed weight[, bias (out)] -> (n, out) float32.

    rows: how many share a load of weights; their sums should fit into registers.
    """
    blocks = num_blocks(out_features)
    vector = f"float32x{LANES}"

    @T.macro
    def tile(
        x: T.handle,
        packed: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
        b: T.int32,
        row: T.int32,
        count: T.meta_var,
    ) -> None:
        acc = T.alloc_buffer((count, LANES), "float32")
        for i in T.unroll(count):
            acc[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for k in T.serial(in_features):
            for i in T.unroll(count):
                acc[i, T.ramp(0, 1, LANES)] = multiply_add(
                    splat(x[T.min(row + i, n - 1), k]),
                    T.Cast(vector, packed[b, k, T.ramp(0, 1, LANES)]),
                    acc[i, T.ramp(0, 1, LANES)],
                )
        store_tile(out, bias, acc, n, b, row, count, out_features, dtype, has_bias)

    @T.macro
    def all_tiles(x: T.handle, packed: T.handle, bias: T.handle, out: T.handle, n: T.int32) -> None:
        if n == 1:
            for b in T.parallel(blocks):
                tile(x, packed, bias, out, n, b, 0, 1)
        else:
            for b in T.parallel(blocks):
                for m in T.serial((n + rows - 1) // rows):
                    tile(x, packed, bias, out, n, b, m * rows, rows)

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
            all_tiles(x, packed, bias, out, n)

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
        all_tiles(x, packed, packed, out, n)

    return matmul_kernel


@T.macro
def store_tile(
    out: T.handle,
    bias: T.handle,
    acc: T.handle,
    n: T.int32,
    b: T.int32,
    row: T.int32,
    rows: T.meta_var,
    out_features: T.meta_var,
    dtype: T.meta_var,
    has_bias: T.meta_var,
) -> None:
    """Write accumulators of one tile, adding the bias and leaving out rows past the end."""
    for i in T.unroll(rows):
        if row + i < n:
            for v in T.serial(LANES):
                if b * LANES + v < out_features:
                    if has_bias:
                        out[row + i, b * LANES + v] = acc[i, v] + T.Cast(
                            "float32", bias[b * LANES + v]
                        )
                    else:
                        out[row + i, b * LANES + v] = acc[i, v]


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
