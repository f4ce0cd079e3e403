"""Linear layers and embeddings on bfloat16 weights, multiplied as pairs of bfloat16.

Packed layout: (ceil(out / 32), pairs, 32) uint32, panels of 32 output rows; a word is a pair of
neighbouring inputs, the first in its low half. Activations come from `bf16_activations.py`. Rows
and inputs past the end are zero. The sum over pairs runs in order, whatever the number of tokens,
so that a token's result does not depend on its batch.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.bf16_activations import ROW_STEP, num_pairs, row_words
from mlc_llm.kernels.cpu.isa import get_bf16_isa
from mlc_llm.kernels.cpu.vector_math import LANES, prefetch, splat

# Output rows of a panel: two vectors share a broadcast of activations.
PANEL = 2 * LANES
# Tokens that share a load of weights.
TILE = 8
# Bytes ahead of use at which weights are fetched (benchmarks/kernels.py, 2-core Zen 5).
PREFETCH_BYTES = 8192
# From this many tokens on, a parallel launch pays for a look-up.
_PARALLEL_TOKENS = 8


def num_panels(out_features: int) -> int:
    """Return the number of panels that hold `out_features` rows."""
    return -(-out_features // PANEL)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Return the packed shape of an (out, in) weight."""
    return (num_panels(out_features), num_pairs(in_features), PANEL)


def pack(out_features: int, in_features: int) -> Any:
    """Pack a weight: (out, in) bfloat16 -> `packed_shape` uint32."""
    panels, pairs, _ = packed_shape(out_features, in_features)

    @T.prim_func(private=True, s_tir=True)
    def pack_pairs_kernel(
        source: T.Buffer((out_features, in_features), "bfloat16"),
        packed: T.Buffer((panels, pairs, PANEL), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        # A cache line of a row at a time: pairs of a row are neighbours, those of a panel are not.
        for b in T.parallel(panels):
            for c in T.serial(pairs // LANES):
                for v in T.serial(PANEL):
                    for j in T.serial(LANES):
                        p = c * LANES + j
                        packed[b, p, v] = T.uint32(0)
                        if b * PANEL + v < out_features:
                            if 2 * p < in_features:
                                packed[b, p, v] = _bits(source[b * PANEL + v, 2 * p])
                            if 2 * p + 1 < in_features:
                                packed[b, p, v] = T.bitwise_or(
                                    packed[b, p, v],
                                    T.shift_left(
                                        _bits(source[b * PANEL + v, 2 * p + 1]), T.uint32(16)
                                    ),
                                )

    return pack_pairs_kernel


def _bits(value: Any) -> Any:
    return T.Cast("uint32", T.reinterpret("uint16", value))


def matmul(out_features: int, in_features: int, isa_name: str, bias_dtype: str | None) -> Any:
    """Multiply: rounded activations of n tokens, packed weight[, bias (out)]
    -> (n, out) float32.

    Products are exact; the two of a pair are added one after the other, each sum rounded.
    """
    isa = get_bf16_isa(isa_name)
    panels, pairs, _ = packed_shape(out_features, in_features)
    width = row_words(in_features)
    has_bias, store_dtype = bias_dtype is not None, bias_dtype or "float32"
    is_whole = out_features % PANEL == 0
    vector = f"float32x{LANES}"

    def dot(total: Any, words: Any, pair: Any) -> Any:
        return T.call_extern(
            vector, isa.dot, total, T.reinterpret(f"int32x{LANES}", words), splat(pair)
        )

    @T.macro
    def store(
        out: T.handle, bias: T.handle, total: T.handle, i: T.int32, row: T.int32, first: T.int32
    ) -> None:
        if is_whole:
            if has_bias:
                out[row, T.ramp(first, 1, LANES)] = total[i, T.ramp(0, 1, LANES)] + T.Cast(
                    vector, bias[T.ramp(first, 1, LANES)]
                )
            else:
                out[row, T.ramp(first, 1, LANES)] = total[i, T.ramp(0, 1, LANES)]
        else:
            for v in T.serial(LANES):
                if first + v < out_features:
                    if has_bias:
                        out[row, first + v] = total[i, v] + T.Cast("float32", bias[first + v])
                    else:
                        out[row, first + v] = total[i, v]

    @T.macro
    def tile(
        x: T.handle,
        packed: T.handle,
        bias: T.handle,
        out: T.handle,
        n: T.int32,
        b: T.int32,
        row: T.int32,
        rows: T.meta_var,
    ) -> None:
        # Two buffers: TVM takes arrays of 1 KB and more from the heap, where sums that should
        # stay in registers are written back at every step.
        left = T.alloc_buffer((rows, LANES), "float32")
        right = T.alloc_buffer((rows, LANES), "float32")
        for i in T.unroll(rows):
            left[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
            right[i, T.ramp(0, 1, LANES)] = splat(T.float32(0))
        for p in T.serial(pairs):
            for half in T.unroll(2):
                T.evaluate(
                    prefetch(
                        packed.access_ptr(
                            "r",
                            offset=(b * pairs + p) * PANEL + half * LANES + PREFETCH_BYTES // 4,
                        )
                    )
                )
            for i in T.unroll(rows):
                left[i, T.ramp(0, 1, LANES)] = dot(
                    left[i, T.ramp(0, 1, LANES)], packed[b, p, T.ramp(0, 1, LANES)], x[row + i, p]
                )
                right[i, T.ramp(0, 1, LANES)] = dot(
                    right[i, T.ramp(0, 1, LANES)],
                    packed[b, p, T.ramp(LANES, 1, LANES)],
                    x[row + i, p],
                )
        for i in T.unroll(rows):
            if row + i < n:
                store(out, bias, left, i, row + i, b * PANEL)
                store(out, bias, right, i, row + i, b * PANEL + LANES)

    @T.macro
    def all_tiles(x: T.handle, packed: T.handle, bias: T.handle, out: T.handle, n: T.int32) -> None:
        with T.attr(0, "pragma_import_llvm", isa.module):
            if n == 1:
                for b in T.parallel(panels):
                    tile(x, packed, bias, out, n, b, 0, 1)
            elif n <= ROW_STEP:
                for b in T.parallel(panels):
                    tile(x, packed, bias, out, n, b, 0, ROW_STEP)
            else:
                # What is left is at most half a tile.
                for b in T.parallel(panels):
                    for m in T.serial((n + TILE - ROW_STEP - 1) // TILE):
                        tile(x, packed, bias, out, n, b, m * TILE, TILE)
                    if n % TILE > 0:
                        if n % TILE <= ROW_STEP:
                            tile(x, packed, bias, out, n, b, n // TILE * TILE, ROW_STEP)

    if has_bias:

        @T.prim_func(private=True, s_tir=True)
        def bf16_matmul_bias_kernel(
            x_handle: T.handle,
            packed: T.Buffer((panels, pairs, PANEL), "uint32"),
            bias: T.Buffer((out_features,), store_dtype),
            out_handle: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            rows = T.int32()
            x = T.match_buffer(x_handle, (rows, width), "int32")
            out = T.match_buffer(out_handle, (n, out_features), "float32")
            all_tiles(x, packed, bias, out, n)

        return bf16_matmul_bias_kernel

    @T.prim_func(private=True, s_tir=True)
    def bf16_matmul_kernel(
        x_handle: T.handle,
        packed: T.Buffer((panels, pairs, PANEL), "uint32"),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        rows = T.int32()
        x = T.match_buffer(x_handle, (rows, width), "int32")
        out = T.match_buffer(out_handle, (n, out_features), "float32")
        all_tiles(x, packed, packed, out, n)

    return bf16_matmul_kernel


def embed(num_embeddings: int, features: int) -> Any:
    """Look rows up in a packed table: ids (n) int32 -> (n, features) float32."""
    panels, pairs, _ = packed_shape(num_embeddings, features)

    @T.macro
    def one_token(ids: T.handle, packed: T.handle, out: T.handle, t: T.int32) -> None:
        for p in T.serial(pairs):
            if 2 * p < features:
                out[t, 2 * p] = T.reinterpret(
                    "float32",
                    T.shift_left(packed[ids[t] // PANEL, p, ids[t] % PANEL], T.uint32(16)),
                )
            if 2 * p + 1 < features:
                out[t, 2 * p + 1] = T.reinterpret(
                    "float32",
                    T.bitwise_and(packed[ids[t] // PANEL, p, ids[t] % PANEL], T.uint32(0xFFFF0000)),
                )

    @T.prim_func(private=True, s_tir=True)
    def embed_pairs_kernel(
        ids_handle: T.handle,
        packed: T.Buffer((panels, pairs, PANEL), "uint32"),
        out_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        ids = T.match_buffer(ids_handle, (n,), "int32")
        out = T.match_buffer(out_handle, (n, features), "float32")
        if n < _PARALLEL_TOKENS:
            for t in T.serial(n):
                one_token(ids, packed, out, t)
        else:
            for t in T.parallel(n):
                one_token(ids, packed, out, t)

    return embed_pairs_kernel
