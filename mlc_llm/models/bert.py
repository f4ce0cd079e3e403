"""BERT for embeddings, and what has its architecture: MiniLM, BGE, E5, GTE, Arctic Embed.

Devlin et al. 2019: every token sees the whole text, norms follow their halves of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.artifact import KVCacheLayout
from mlc_llm.errors import CorruptFile, OptionError, UnsupportedModel
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.llama import attention_shape
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.encoder import add_entry, see_whole
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class BertConfig(DecoderConfig):
    """Sizes of BERT's tables, and what of a decoder's settings it has not.

    max_position_embeddings: entries of the table of positions, which no text can exceed.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"rms_norm_eps": ("layer_norm_eps",)}

    max_position_embeddings: int = 512
    type_vocab_size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_position_embeddings", "type_vocab_size"):
            if getattr(self, name) < 1:
                raise CorruptFile(f"model configuration: {name} is {getattr(self, name)!r}")
        if self.context_window_size > self.max_position_embeddings:
            raise OptionError(
                f"context_window_size={self.context_window_size} is more than the "
                f"{self.max_position_embeddings} positions that the model knows; use at most that"
            )
        for name in ("sliding_window_size", "attention_sink_size"):
            if getattr(self, name) > 0:
                raise OptionError(
                    f"{name}={getattr(self, name)} has no meaning for a model that sees a text as "
                    "a whole; leave it out"
                )

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return no rotary embedding: positions are looked up."""
        return ()

    def kv_dtype(self, model_dtype: str) -> str:
        """Return the dtype of pages; exact unless set, since they hold one step alone."""
        return "float32" if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        kind = config.get("position_embedding_type") or "absolute"
        if kind != "absolute":
            raise UnsupportedModel(
                f"position_embedding_type {kind!r} is not supported; supported: absolute"
            )
        for name in ("is_decoder", "add_cross_attention"):
            if config.get(name):
                raise UnsupportedModel(f"{name} of a BERT model is not supported; it must be false")
        fields = super().huggingface_fields(config)
        return {
            **fields,
            "hidden_act": config.get("hidden_act") or "gelu",
            "max_position_embeddings": fields["context_window_size"],
            "type_vocab_size": config.get("type_vocab_size") or 2,
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> BertConfig:
        """Build from an artifact's `model_config`; MLC LLM's tables end with the context."""
        positions = model_config.get("context_window_size", 512)
        return super().from_json({"max_position_embeddings": positions, **model_config})


class _SelfAttention(nn.Module):
    """Attention of every token to its whole sequence, q, k and v fused."""

    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__()
        self.shape = attention_shape(config, 0)
        self.qkv = Linear(config.hidden_size, config.qkv_features, dtype, bias=True)

    def forward(self, x: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (n, hidden) float32."""
        # Keys and values of the layer before are not needed any more: all layers share pages.
        return kv.attend(0, self.qkv(x), self.shape, rope=None)


class _Output(nn.Module):
    """LayerNorm(residual + dense(x))."""

    def __init__(self, config: BertConfig, in_features: int, dtype: str) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size, dtype, bias=True)
        self.LayerNorm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32."""
        return self.LayerNorm(ops.add(self.dense(x), residual))


class _Attention(nn.Module):
    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__()
        self.self = _SelfAttention(config, dtype)
        self.output = _Output(config, config.num_attention_heads * config.head_dim, dtype)

    def forward(self, x: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (n, hidden) float32."""
        return self.output(self.self(x, kv), x)


class _Intermediate(nn.Module):
    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype, bias=True)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Return (n, intermediate) float32."""
        return row_ops.activate(self.dense(x), self.activation)


class _Layer(nn.Module):
    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__()
        self.attention = _Attention(config, dtype)
        self.intermediate = _Intermediate(config, dtype)
        self.output = _Output(config, config.intermediate_size, dtype)

    def forward(self, x: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (n, hidden) float32."""
        x = self.attention(x, kv)
        return self.output(self.intermediate(x), x)


class _Embeddings(nn.Module):
    """LayerNorm(word + position + token type); a single text has the token type 0."""

    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, dtype)
        self.position_embeddings = Embedding(config.max_position_embeddings, width, dtype)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width, dtype)
        self.LayerNorm = LayerNorm(width, config.rms_norm_eps, dtype)

    def forward(self, token_ids: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32; token_ids and positions (n) int32."""
        x = ops.add(self.word_embeddings(token_ids), self.position_embeddings(positions))
        return self.LayerNorm(add_entry(x, self.token_type_embeddings, 0))


class _Encoder(nn.Module):
    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Layer(config, dtype) for _ in range(config.num_hidden_layers)])

    def forward(self, x: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (n, hidden) float32."""
        for layer in self.layer:
            x = layer(x, kv)
        return x


class Bert(CausalLM):
    """BERT without pooler and heads: hidden states of whole texts."""

    def __init__(self, config: BertConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self.embeddings = _Embeddings(config, dtype)
        self.encoder = _Encoder(config, dtype)

    def kv_layout(self) -> KVCacheLayout:
        """Return the shape of the pages, which all layers use one after the other."""
        return dataclasses.replace(super().kv_layout(), num_layers=1)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        return self.encoder(self.embeddings(token_ids, kv.positions), see_whole(kv))

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Return the rows: the last layer has normalised them."""
        return hidden


def build(config: BertConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return Bert(config, dtype)


_FUSED = {
    "attention.self.qkv": ("attention.self.query", "attention.self.key", "attention.self.value")
}
_EMBEDDING = {"model_type": "encoder", "pooling_strategy": "cls", "normalize": True}
FAMILY = Family(
    "bert",
    ("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    BertConfig,
    build,
    _FUSED,
    embedding=_EMBEDDING,
    base_prefix="bert.",
    unused=("pooler.", "cls."),
)
# What MLC LLM calls checkpoints whose names begin with "bert."; here both are read either way.
BGE = dataclasses.replace(FAMILY, name="bert-bge", architectures=())
