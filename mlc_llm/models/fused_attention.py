"""Attention with one linear for q, k and v, under the names a family gives its two linears."""

from __future__ import annotations

from tvm.relax.frontend import nn

from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.llama import attention_shape
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.ops import Rows


class FusedAttention(nn.Module):
    """Grouped-query attention.

    names: attributes, and so parameter names, of the linears for input and output.
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
    ) -> None:
        super().__init__()
        self.names = names
        self.shape, self.rope = attention_shape(config, layer), config.rope_of(layer)
        hidden_size, width = config.hidden_size, config.num_attention_heads * config.head_dim
        setattr(self, names[0], Linear(hidden_size, config.qkv_features, dtype, bias))
        setattr(self, names[1], Linear(width, hidden_size, dtype, output_bias))

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        joined, output = (getattr(self, name) for name in self.names)
        out: nn.Tensor = output(kv.attend(layer, joined(x), self.shape, self.rope))
        return out
