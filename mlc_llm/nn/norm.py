"""Normalisation layers."""

from __future__ import annotations

import math

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.kernels.cpu.norm import HeadNorm
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.ops import Rows


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter((hidden_size,), dtype)

    def forward(self, x: nn.Tensor) -> Rows:
        """Return the normalised (n, hidden) float32, computed where they are used."""
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016) with a learned scale, and a learned shift if `bias`.

    adds_one: the scale is 1 + weight. Without `affine` there is neither scale nor shift.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        dtype: str,
        *,
        bias: bool = True,
        affine: bool = True,
        adds_one: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.adds_one = eps, adds_one
        self.weight = nn.Parameter((hidden_size,), dtype) if affine else None
        self.bias = nn.Parameter((hidden_size,), dtype) if affine and bias else None

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Return the normalised (n, hidden) float32."""
        return row_ops.layer_norm(x, self.weight, self.bias, self.eps, self.adds_one)


class HeadLayerNorm(nn.Module):
    """Layer norm of heads, each with its own scale and without shift; applied by `norm_heads`."""

    def __init__(self, num_heads: int, head_dim: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter((num_heads, head_dim), dtype)


def norm_heads(
    qkv: nn.Tensor,
    q_norm: RMSNorm | HeadLayerNorm,
    k_norm: RMSNorm | HeadLayerNorm,
    shape: AttentionShape,
    *,
    is_whole: bool = False,
) -> nn.Tensor:
    """Return [q; k; v] (n, width) float32 with queries and keys normalised.

    Every head by itself, with weights of one head for all of them (Qwen3) or of each (Cohere), or
    all heads of a token at once if `is_whole` (OLMo 2).
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    parts = (1, heads * head_dim, 1, kv_heads * head_dim)
    if not is_whole:
        parts = (heads, head_dim, kv_heads, head_dim)
    head_norm = HeadNorm(
        num_q=parts[0],
        q_width=parts[1],
        q_items=math.prod(int(extent) for extent in q_norm.weight.shape),
        num_k=parts[2],
        k_width=parts[3],
        k_items=math.prod(int(extent) for extent in k_norm.weight.shape),
        v_width=kv_heads * head_dim,
        eps=q_norm.eps,
        is_centered=isinstance(q_norm, HeadLayerNorm),
    )
    return row_ops.norm_heads(qkv, q_norm.weight, k_norm.weight, head_norm)


def unit_heads(qkv: nn.Tensor, eps: float, shape: AttentionShape) -> nn.Tensor:
    """Return [q; k; v] with every query and key head divided by its root mean square."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    ones = nn.Tensor.from_const(np.ones(head_dim, np.float32))
    norm = HeadNorm(
        *(heads, head_dim, head_dim, kv_heads, head_dim, head_dim),
        v_width=kv_heads * head_dim,
        eps=eps,
    )
    return row_ops.norm_heads(qkv, ones, ones, norm)
