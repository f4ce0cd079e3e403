"""Attention with one linear for q, k and v, under the names a family gives its two linears."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.llama import attention_shape
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import HeadLayerNorm, norm_heads
from mlc_llm.nn.ops import Rows


class FusedAttention(nn.Module):
    """Grouped-query attention.

    names: attributes, and so parameter names, of the linears for input and output. has_head_norms:
    whether each head of q and k has a layer norm with weights of its own.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: str,
        layer: int,
        names: tuple[str, str],
        *,
        bias: bool = True,
        output_bias: bool = True,
        has_head_norms: bool = False,
    ) -> None:
        super().__init__()
        self.names = names
        self.shape, self.rope = attention_shape(config, layer), config.rope_of(layer)
        hidden_size, width = config.hidden_size, config.num_attention_heads * config.head_dim
        setattr(self, names[0], Linear(hidden_size, config.qkv_features, dtype, bias))
        setattr(self, names[1], Linear(width, hidden_size, dtype, output_bias))
        self.has_head_norms = has_head_norms
        if has_head_norms:
            head_dim, eps = config.head_dim, config.rms_norm_eps
            self.q_norm = HeadLayerNorm(config.num_attention_heads, head_dim, eps, dtype)
            self.k_norm = HeadLayerNorm(config.num_key_value_heads, head_dim, eps, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        joined, output = (getattr(self, name) for name in self.names)
        qkv = joined(x)
        if self.has_head_norms:
            qkv = norm_heads(qkv, self.q_norm, self.k_norm, self.shape)
        out: nn.Tensor = output(kv.attend(layer, qkv, self.shape, self.rope))
        return out
