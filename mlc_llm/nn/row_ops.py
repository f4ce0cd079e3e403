"""Operations on rows without a matrix product, each a call of the kernel for its shape.

Like `ops.py` for norms, activations and factors that only some families need.
"""

from __future__ import annotations

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import activation as activation_kernels
from mlc_llm.kernels.cpu import elementwise, query_scale, rope
from mlc_llm.kernels.cpu import norm as norm_kernels
from mlc_llm.kernels.cpu.norm import HeadNorm
from mlc_llm.kernels.cpu.query_scale import QueryScale
from mlc_llm.nn import gpu_ops
from mlc_llm.nn.activations import ACTIVATIONS
from mlc_llm.nn.kernel_call import kernel_of, on_gpu
from mlc_llm.nn.ops import Rows, emit, silu_mul


@on_gpu(gpu_ops.layer_norm)
def layer_norm(
    x: nn.Tensor,
    weight: nn.Tensor | None,
    bias: nn.Tensor | None,
    eps: float,
    adds_one: bool = False,
) -> nn.Tensor:
    """Return (x - mean) / deviation * weight + bias; x (n, h) float32."""
    width = int(x.shape[1])
    dtype = "float32" if weight is None else weight.dtype
    if weight is None:
        weight = nn.Tensor.from_const(np.ones(width, np.float32))
    if bias is None:
        zeros = np.zeros(width, np.float32)
        bias = nn.Tensor.from_const(zeros)
        bias = bias if dtype == "float32" else nn.op.astype(bias, dtype)
    kernel = kernel_of(norm_kernels.layer_norm, width, dtype, eps, adds_one)
    return emit("layer_norm", kernel, [x, weight, bias], x.shape)


@on_gpu(gpu_ops.norm_heads)
def norm_heads(x: nn.Tensor, q: nn.Tensor, k: nn.Tensor, shape: HeadNorm) -> nn.Tensor:
    """Return rows [q; k; v] (n, width) float32 with queries and keys normalised."""
    flat = [w if len(w.shape) == 1 else nn.op.reshape(w, (-1,)) for w in (q, k)]
    kernel = kernel_of(norm_kernels.norm_heads, shape, q.dtype)
    return emit("norm_heads", kernel, [x, *flat], x.shape)


@on_gpu(gpu_ops.scale_queries)
def scale_queries(x: nn.Tensor, positions: nn.Tensor, q_width: int, scale: QueryScale) -> nn.Tensor:
    """Return rows [q; k; v] (n, width) float32 with queries scaled by positions (n) int32."""
    kernel = kernel_of(query_scale.scale_queries, scale, q_width, int(x.shape[1]))
    return emit("scale_queries", kernel, [x, positions], x.shape)


@on_gpu(gpu_ops.rotate_heads)
def rotate_heads(
    qkv: nn.Tensor, table: nn.Tensor, heads: tuple[int, int, int], is_interleaved: bool
) -> nn.Tensor:
    """Return rows (n, width) float32 rotated by a table (n, rotary_dim) of `ops.rope_table`.

    heads: how many are rotated, how many follow that are not, and their size.
    """
    kernel = kernel_of(rope.rotate, heads, int(table.shape[1]), is_interleaved)
    return emit("rotate_heads", kernel, [qkv, table], qkv.shape)


@on_gpu(gpu_ops.activate)
def activate(x: nn.Tensor, name: str) -> nn.Tensor:
    """Return an activation of x (n, width) float32; name: as configurations call it."""
    kernel = kernel_of(activation_kernels.activate, int(x.shape[1]), ACTIVATIONS[name])
    return emit(ACTIVATIONS[name], kernel, [x], x.shape)


@on_gpu(gpu_ops.gated)
def gated(x: nn.Tensor, name: str, is_gate_first: bool = True) -> nn.Tensor | Rows:
    """Return act(gate) * up for x (n, 2 * width) float32: [gate; up], or [up; gate]."""
    kind, width = ACTIVATIONS[name], int(x.shape[1]) // 2
    if kind == "silu" and is_gate_first:
        return silu_mul(x)
    kernel = kernel_of(activation_kernels.gated, width, kind, is_gate_first)
    return emit(f"{kind}_mul", kernel, [x], [x.shape[0], width])


@on_gpu(gpu_ops.bounded_swiglu)
def bounded_swiglu(x: nn.Tensor, alpha: float, limit: float) -> nn.Tensor:
    """Return what the bounded gate and up of x (n, 2 * width) float32, [gate; up], make."""
    width = int(x.shape[1]) // 2
    kernel = kernel_of(activation_kernels.bounded_swiglu, width, float(alpha), float(limit))
    return emit("bounded_swiglu", kernel, [x], [x.shape[0], width])


@on_gpu(gpu_ops.clip)
def clip(x: nn.Tensor, bound: float) -> nn.Tensor:
    """Return x within +-bound; x (n, width) float32."""
    kernel = kernel_of(activation_kernels.clip, int(x.shape[1]), float(bound))
    return emit("clip", kernel, [x], x.shape)


@on_gpu(gpu_ops.join)
def join(*parts: nn.Tensor) -> nn.Tensor:
    """Return rows side by side: (n, width) float32 each -> (n, sum of widths)."""
    joined, *rest = parts
    for part in rest:
        widths = int(joined.shape[1]), int(part.shape[1])
        kernel = kernel_of(elementwise.join, *widths)
        joined = emit("join", kernel, [joined, part], [part.shape[0], sum(widths)])
    return joined


@on_gpu(gpu_ops.scale)
def scale(x: nn.Tensor, factor: float) -> nn.Tensor:
    """Return x * factor; x (n, width) float32."""
    if factor == 1:
        return x
    kernel = kernel_of(activation_kernels.scale, int(x.shape[1]), float(factor))
    return emit("scale", kernel, [x], x.shape)


@on_gpu(gpu_ops.soft_cap)
def soft_cap(x: nn.Tensor, cap: float) -> nn.Tensor:
    """Return cap * tanh(x / cap); x (n, width) float32."""
    kernel = kernel_of(activation_kernels.soft_cap, int(x.shape[1]), float(cap))
    return emit("soft_cap", kernel, [x], x.shape)
