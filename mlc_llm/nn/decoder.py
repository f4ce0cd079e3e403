"""The pre-norm transformer decoder that most families share; a family supplies its attention."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.relax.frontend import nn

from mlc_llm.nn import ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        x = ops.add(x, self.self_attn(self.input_layernorm(x), kv, layer))
        return ops.add(x, self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm. A layer takes (x, kv, its number)."""

    def __init__(
        self, embed_tokens: Embedding, layers: Sequence[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(list(layers))
        self.norm = norm

    def forward(self, hidden: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Run all layers; the final norm is left to the caller, who needs few rows of it."""
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, kv, index)
        return hidden
