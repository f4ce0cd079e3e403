"""Operations of `latent.py` on GPUs: each a call of the kernels for its shapes."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.kernels.cpu.latent import LatentShape
from mlc_llm.kernels.gpu import latent as latent_kernels
from mlc_llm.nn.gpu_ops import known_rows
from mlc_llm.nn.kernel_call import call, kernel_of


def head_linear(x: nn.Tensor, weight: nn.Tensor, stride: int, offset: int) -> nn.Tensor:
    """Return each head's items from `offset` on times its matrix; weight (heads, out, in).

    x: (n, heads * stride) -> (n, heads * out).
    """
    heads, out_features, in_features = (int(extent) for extent in weight.shape)
    n, dtype = x.shape[0], x.dtype
    options = heads, stride, offset, in_features, dtype
    kernel = kernel_of(latent_kernels.head_columns, known_rows(x), *options)
    items = call("head_columns", kernel, [x], [n, heads, in_features], dtype)
    sizes = heads, out_features, in_features, dtype
    kernel = kernel_of(latent_kernels.head_linear, known_rows(x), *sizes)
    product = call("head_linear", kernel, [items, weight], [n, heads, out_features], dtype)
    rows: nn.Tensor = nn.op.reshape(product, (n, heads * out_features))
    return rows


def join_latent(
    shape: LatentShape, q: nn.Tensor, latent_q: nn.Tensor, latent: nn.Tensor, kv_a: nn.Tensor
) -> nn.Tensor:
    """Return queries, the key and the value as attention takes them, see the kernel."""
    n, heads = q.shape[0], shape.num_heads
    kernel = kernel_of(latent_kernels.join_latent, known_rows(q), shape, q.dtype)
    args = [q, nn.op.reshape(latent_q, (n, heads, shape.rank)), latent, kv_a]
    joined: nn.Tensor = call(
        "join_latent", kernel, args, [n, (heads + 2) * shape.head_dim], q.dtype
    )
    return joined
