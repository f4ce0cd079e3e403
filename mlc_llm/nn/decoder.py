"""The transformer decoder that most families share; a family supplies its attention.

Attributes are parameter names, and families call the same parts differently: `DecoderNames`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.relax.frontend import nn

from mlc_llm.nn import ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding


@dataclass(frozen=True)
class DecoderNames:
    """What a family calls the parts of the model, of the decoder in it and of its layers."""

    model: str = "model"
    lm_head: str = "lm_head"
    embed_tokens: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"


NAMES = DecoderNames()


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        attention_norm: nn.Module,
        mlp_norm: nn.Module,
        names: DecoderNames = NAMES,
    ) -> None:
        super().__init__()
        self.names = names
        setattr(self, names.attention, attention)
        setattr(self, names.mlp, mlp)
        setattr(self, names.attention_norm, attention_norm)
        setattr(self, names.mlp_norm, mlp_norm)

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        names = self.names
        attention, mlp = getattr(self, names.attention), getattr(self, names.mlp)
        attention_norm, mlp_norm = (
            getattr(self, names.attention_norm),
            getattr(self, names.mlp_norm),
        )
        x = ops.add(x, attention(attention_norm(x), kv, layer))
        return ops.add(x, mlp(mlp_norm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm. A layer takes (x, kv, its number)."""

    def __init__(
        self,
        embed_tokens: Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        names: DecoderNames = NAMES,
    ) -> None:
        super().__init__()
        self.names = names
        setattr(self, names.embed_tokens, embed_tokens)
        setattr(self, names.layers, nn.ModuleList(list(layers)))
        setattr(self, names.norm, norm)

    @property
    def embedding(self) -> Embedding:
        """Return the table of tokens, under whatever name."""
        table: Embedding = getattr(self, self.names.embed_tokens)
        return table

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | ops.Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return getattr(self, self.names.norm)(hidden)

    def forward(self, hidden: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Run all layers; the final norm is left to the caller, who needs few rows of it."""
        for index, layer in enumerate(getattr(self, self.names.layers)):
            hidden = layer(hidden, kv, index)
        return hidden
