"""Activations rounded to bfloat16, as pairs that kernels multiply with pairs of weights.

Rounded activations are one int32 array (tokens, row_words): a word is two neighbouring values of a
token, the first in its low half. A token's values are padded with zeros to whole vectors of pairs,
its row with 64 unused bytes, and the tokens to a multiple of `ROW_STEP` with unused rows.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlc_llm.kernels.cpu.activations import Source, source_values
from mlc_llm.kernels.cpu.elementwise import rms_factor
from mlc_llm.kernels.cpu.isa import get_bf16_isa
from mlc_llm.kernels.cpu.vector_math import LANES, splat

# Tokens come in multiples of this.
ROW_STEP = 4
# Values that are rounded at once.
_WIDTH = 2 * LANES


def num_pairs(features: int) -> int:
    """Return the pairs that hold a token's values."""
    return -(-features // _WIDTH) * LANES


def row_words(features: int) -> int:
    """Return the words of a row. The unused ones keep rows apart in the sets of a cache."""
    return num_pairs(features) + LANES


def round_activations(features: int, source: Source, isa_name: str) -> Any:
    """Round: x float32[, weight] -> (rows, row_words) int32, see the module."""
    isa = get_bf16_isa(isa_name)
    kind, weight_dtype = source.kind, source.weight_dtype
    x_width = 2 * features if kind == "silu_mul" else features
    whole, width = features // _WIDTH, row_words(features)
    rest = features - whole * _WIDTH
    factor_of = rms_factor(features, source.eps)

    def join(low: Any, high: Any) -> Any:
        return T.call_extern(f"int32x{LANES}", isa.join, low, high)

    @T.macro
    def one_token(x: T.handle, weight: T.handle, out: T.handle, t: T.int32) -> None:
        factor = T.alloc_buffer((1,), "float32")
        if kind == "rms_norm":
            factor_of(x, factor, t)
        for v in T.serial(whole):
            out[t, T.ramp(v * LANES, 1, LANES)] = join(
                source_values(source, x, weight, factor, t, v * _WIDTH, features, LANES),
                source_values(source, x, weight, factor, t, v * _WIDTH + LANES, features, LANES),
            )
        if rest > 0:
            row = T.alloc_buffer((_WIDTH,), "float32")
            row[T.ramp(0, 1, LANES)] = splat(T.float32(0))
            row[T.ramp(LANES, 1, LANES)] = splat(T.float32(0))
            for k in T.serial(rest):
                row[k] = source_values(
                    source, x, weight, factor, t, whole * _WIDTH + k, features, 1
                )
            out[t, T.ramp(whole * LANES, 1, LANES)] = join(
                row[T.ramp(0, 1, LANES)], row[T.ramp(LANES, 1, LANES)]
            )

    @T.macro
    def all_tokens(x: T.handle, weight: T.handle, out: T.handle, n: T.int32) -> None:
        with T.attr(0, "pragma_import_llvm", isa.module):
            if n < ROW_STEP:
                for t in T.serial(n):
                    one_token(x, weight, out, t)
            else:
                for t in T.parallel(n):
                    one_token(x, weight, out, t)

    if kind == "rms_norm":

        @T.prim_func(private=True, s_tir=True)
        def norm_and_round_kernel(
            x_handle: T.handle, weight_handle: T.handle, out_handle: T.handle
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            n = T.int32()
            rows = T.int32()
            x = T.match_buffer(x_handle, (n, x_width), "float32")
            weight = T.match_buffer(weight_handle, (features,), weight_dtype)
            out = T.match_buffer(out_handle, (rows, width), "int32")
            all_tokens(x, weight, out, n)

        return norm_and_round_kernel

    @T.prim_func(private=True, s_tir=True)
    def round_kernel(x_handle: T.handle, out_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int32()
        rows = T.int32()
        x = T.match_buffer(x_handle, (n, x_width), "float32")
        out = T.match_buffer(out_handle, (rows, width), "int32")
        all_tokens(x, x, out, n)

    return round_kernel
