"""The KV object of libraries that GPUs run: attention goes to TVM's own paged cache.

The cache holds pages, page tables and its kernels; whoever runs the library tells it which
sequences a step is about. Queries and keys are rotated here, so that every rotary embedding works.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

from mlc_llm.errors import UnsupportedModel
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.nn import gpu_ops
from mlc_llm.nn.rope import RopeConfig

__all__ = ["CachedKV", "PagedKVCache", "create_cache"]


@dataclass
class CachedKV:
    """What a step hands to every attention layer, in place of `kv.PagedKV`.

    positions: (n) int32, of the step's tokens. window: tokens that the whole model sees, which is
    the cache's affair; -1 for all.
    """

    cache: PagedKVCache
    positions: nn.Tensor
    ropes: tuple[RopeConfig, ...]
    window: int

    def rotate(self, qkv: nn.Tensor, shape: AttentionShape, rope: int = 0) -> nn.Tensor:
        """Return [q; k; v] with q and k turned, for layers that do more before they attend."""
        turned, kept = shape.num_heads + shape.num_kv_heads, shape.num_kv_heads
        return gpu_ops.rotate(qkv, self.positions, turned, kept, shape.head_dim, self.ropes[rope])

    def attend(
        self,
        layer: int,
        qkv: nn.Tensor,
        shape: AttentionShape,
        rope: int | None = 0,
        sink_logits: nn.Tensor | None = None,
    ) -> nn.Tensor:
        """Write K and V of this step, attend; qkv (n, (h + 2 kv) * d) -> (n, h * d).

        Raises UnsupportedModel for what the cache cannot do.
        """
        _check(shape, self.window, sink_logits is not None)
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        if rope is not None:
            qkv = self.rotate(qkv, shape, rope)
        n = qkv.shape[0]
        joined = nn.op.reshape(qkv, (1, n, heads + 2 * kv_heads, head_dim))
        out = self.cache.attention_with_fused_qkv(layer, joined, heads, shape.scale)
        attended: nn.Tensor = nn.op.reshape(out, (n, heads * head_dim))
        return attended


def _check(shape: AttentionShape, window: int, has_sink_logits: bool) -> None:
    refused = {
        "scores that sink": has_sink_logits,
        "soft-capped scores": shape.soft_cap > 0,
        "scores that fall with distance (ALiBi)": shape.alibi,
        "chunked windows": shape.is_chunked,
        "windows that differ by layer": shape.window != window,
    }
    for what, is_needed in refused.items():
        if is_needed:
            raise UnsupportedModel(f"its attention has {what}, which GPUs cannot do yet")


def create_cache(
    limits: list[tvm.tirx.Var], num_layers: int, shape: tuple[int, int, int], dtype: str
) -> PagedKVCache:
    """Return a new cache; shape: heads, KV heads and head_dim of every layer's attention.

    limits: sequences, tokens in all, tokens of a step, tokens of a page, and whether the window
    slides (0 or 1). Raises UnsupportedModel.
    """
    heads, kv_heads, head_dim = shape
    try:
        return _create_cache(limits, num_layers, shape, dtype)
    except AssertionError as error:
        raise UnsupportedModel(
            f"its attention, {heads} heads of {head_dim} items over {kv_heads} of keys, does not "
            f"fit the kernels of TVM's cache ({error})"
        ) from None


def _create_cache(
    limits: list[tvm.tirx.Var], num_layers: int, shape: tuple[int, int, int], dtype: str
) -> PagedKVCache:
    heads, kv_heads, head_dim = shape
    return TIRPagedKVCache(
        "mha",
        *limits,
        layer_partition=relax.ShapeExpr([0, num_layers]),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        mla_original_qk_head_dim=0,
        mla_original_v_head_dim=0,
        rope_mode=RopeMode.NONE,
        rope_scale=1,
        rope_theta=10000,
        rope_scaling={},
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=head_dim,
        enable_disaggregation=False,
        dtype=dtype,
        target=tvm.target.Target.current(),
    )
