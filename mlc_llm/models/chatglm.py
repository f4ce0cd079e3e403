"""ChatGLM2, ChatGLM3 and GLM-4-9B: half of each head rotated, as neighbours; names of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn.decoder import DecoderLayer, DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.norm import RMSNorm
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig

# Switches that change the arithmetic, and what they are in every published model.
_FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
}
_NAMES = DecoderNames(attention="self_attention")


@dataclass(frozen=True)
class ChatGLMConfig(DecoderConfig):
    """A decoder under GLM's names; `multi_query_group_num` counts KV heads."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "num_hidden_layers": ("num_layers",),
        "intermediate_size": ("ffn_hidden_size",),
        "vocab_size": ("padded_vocab_size",),
        "head_dim": ("kv_channels",),
        "rms_norm_eps": ("layernorm_epsilon",),
        "num_key_value_heads": ("multi_query_group_num",),
    }
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}

    add_qkv_bias: bool = True
    add_bias_linear: bool = False

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._with_own_names(config)
        if config.get("multi_query_attention") is False:
            values["num_key_value_heads"] = values.get("num_attention_heads")
        return values

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise UnsupportedModel(f"configuration: {name}={config[name]!r} is not supported")
        longest = config.get("seq_length")
        base = 10000.0 * float(config.get("rope_ratio") or 1)
        named = {**config, "max_position_embeddings": longest, "rope_theta": base}
        return {
            **super().huggingface_fields(named),
            "add_qkv_bias": bool(config.get("add_qkv_bias", True)),
            "add_bias_linear": bool(config.get("add_bias_linear", False)),
        }

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding of neighbours."""
        return tuple(dataclasses.replace(rope, is_interleaved=True) for rope in super().ropes)


class ChatGLMEncoder(nn.Module):
    """Layers and final norm."""

    def __init__(self, config: ChatGLMConfig, dtype: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [_make_layer(config, dtype, layer) for layer in range(config.num_hidden_layers)]
        )
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)


def _make_layer(config: ChatGLMConfig, dtype: str, layer: int) -> DecoderLayer:
    size, width, bias = config.hidden_size, config.intermediate_size, config.add_bias_linear
    attention = FusedAttention(
        config,
        dtype,
        layer,
        ("query_key_value", "dense"),
        bias=config.add_qkv_bias or bias,
        output_bias=bias,
    )
    names = ("dense_h_to_4h", "dense_4h_to_h")
    mlp = GatedMLP(size, width, dtype, bias, config.hidden_act, names)
    before_attention, before_mlp = (RMSNorm(size, config.rms_norm_eps, dtype) for _ in range(2))
    return DecoderLayer(attention, mlp, before_attention, before_mlp, _NAMES)


class ChatGLMModel(nn.Module):
    """Embedding, layers and output layer."""

    def __init__(self, config: ChatGLMConfig, dtype: str) -> None:
        super().__init__()
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.encoder = ChatGLMEncoder(config, dtype)
        if not config.tie_word_embeddings:
            self.output_layer = Linear(config.hidden_size, config.vocab_size, dtype)


class ChatGLM(CausalLM):
    """ChatGLM with its output layer."""

    def __init__(self, config: ChatGLMConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self.transformer = ChatGLMModel(config, dtype)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        x = self.transformer.embedding(token_ids)
        for index, layer in enumerate(self.transformer.encoder.layers):
            x = layer(x, kv, index)
        return x

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.transformer.encoder.final_layernorm(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        if self.config.tie_word_embeddings:
            return self.transformer.embedding.logits(rows)
        return self.transformer.output_layer(rows)


def _special(config: ChatGLMConfig, parameter: str) -> ParamRule | None:
    del config
    is_table = parameter == "transformer.embedding.weight"
    return ParamRule(("transformer.embedding.word_embeddings.weight",)) if is_table else None


FAMILY = Family(
    "chatglm",
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    ChatGLMConfig,
    ChatGLM,
    special=_special,
)
