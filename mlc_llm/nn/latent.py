"""Multi-head latent attention (DeepSeek-AI 2024, section 2.1): one small cached head for all."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu import latent as latent_kernels
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.kernels.cpu.latent import LatentShape
from mlc_llm.nn import gpu_latent, gpu_ops
from mlc_llm.nn.kernel_call import on_gpu
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import RMSNorm
from mlc_llm.nn.ops import Rows, emit, kernel_of, materialize


@on_gpu(gpu_latent.head_linear)
def _head_linear(x: nn.Tensor, weight: nn.Tensor, stride: int, offset: int) -> nn.Tensor:
    heads, out_features, in_features = (int(extent) for extent in weight.shape)
    kernel = kernel_of(
        latent_kernels.head_linear,
        *(heads, out_features, in_features, stride, offset, weight.dtype),
    )
    return emit("head_linear", kernel, [x, weight], [x.shape[0], heads * out_features])


@on_gpu(gpu_ops.columns)
def _columns(x: nn.Tensor, start: int, count: int) -> nn.Tensor:
    kernel = kernel_of(latent_kernels.take_columns, int(x.shape[1]), start, count)
    return emit("take_columns", kernel, [x], [x.shape[0], count])


@on_gpu(gpu_latent.join_latent)
def _join_latent(
    shape: LatentShape, q: nn.Tensor, latent_q: nn.Tensor, latent: nn.Tensor, kv_a: nn.Tensor
) -> nn.Tensor:
    kernel = kernel_of(latent_kernels.join_latent, shape)
    joined = [q.shape[0], (shape.num_heads + 2) * shape.head_dim]
    return emit("join_latent", kernel, [q, latent_q, latent, kv_a], joined)


class LatentAttention(nn.Module):
    """Queries, perhaps compressed (`query_rank` above 0), against latent vectors in the cache.

    w_uk (heads, rank, nope) brings queries into the latent space, w_uv (heads, value, rank) values
    out of it. attention: the shape of the paged attention over one head [rope; latent].
    """

    def __init__(
        self,
        shape: LatentShape,
        attention: AttentionShape,
        hidden_size: int,
        query_rank: int,
        eps: float,
        dtype: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.attention, self.query_rank = shape, attention, query_rank
        heads, width = shape.num_heads, shape.num_heads * shape.query_dim
        if query_rank:
            self.q_a_proj = Linear(hidden_size, query_rank, dtype, bias)
            self.q_a_layernorm = RMSNorm(query_rank, eps, dtype)
            self.q_b_proj = Linear(query_rank, width, dtype)
        else:
            self.q_proj = Linear(hidden_size, width, dtype)
        self.kv_a_proj_with_mqa = Linear(hidden_size, shape.rank + shape.rope_dim, dtype, bias)
        self.kv_a_layernorm = RMSNorm(shape.rank, eps, dtype)
        self.w_uk = nn.Parameter((heads, shape.rank, shape.nope_dim), dtype)
        self.w_uv = nn.Parameter((heads, shape.value_dim, shape.rank), dtype)
        self.o_proj = Linear(heads * shape.value_dim, hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        shape = self.shape
        if self.query_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        compressed = self.kv_a_proj_with_mqa(x)
        latent = materialize(self.kv_a_layernorm(_columns(compressed, 0, shape.rank)))
        latent_q = _head_linear(q, self.w_uk, shape.query_dim, 0)
        joined = _join_latent(shape, q, latent_q, latent, compressed)
        attended = kv.attend(layer, joined, self.attention)
        return self.o_proj(_head_linear(attended, self.w_uv, shape.head_dim, shape.rope_dim))
