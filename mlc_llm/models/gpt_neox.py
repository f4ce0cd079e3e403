"""GPT-NeoX: Pythia, RedPajama, Dolly. Attention and feed-forward may run side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import regroup_qkv
from mlc_llm.nn import ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    """A decoder that rotates a share of each head."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rms_norm_eps": ("layer_norm_eps",),
        "partial_rotary_factor": ("rotary_pct",),
    }
    use_parallel_residual: bool = True
    attention_bias: bool = True

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        base = config.get("rope_theta") or config.get("rotary_emb_base")
        share = {"partial_rotary_factor": 0.25, "rope_theta": base}
        named = {**share, **{k: v for k, v in config.items() if v is not None}}
        return {
            **super().huggingface_fields(named),
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-5),
            "hidden_act": config.get("hidden_act") or "gelu",
            "use_parallel_residual": bool(config.get("use_parallel_residual", True)),
            "attention_bias": bool(config.get("attention_bias", True)),
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> GPTNeoXConfig:
        """Build from an artifact's `model_config`; MLC LLM's names no activation."""
        return super().from_json({"hidden_act": "gelu", **model_config})


class GPTNeoXLayer(nn.Module):
    """Both halves read x, or the second reads what the first made of it."""

    def __init__(self, config: GPTNeoXConfig, dtype: str, layer: int) -> None:
        super().__init__()
        size, eps, bias = config.hidden_size, config.rms_norm_eps, config.attention_bias
        self.is_parallel = config.use_parallel_residual
        self.input_layernorm = LayerNorm(size, eps, dtype)
        self.post_attention_layernorm = LayerNorm(size, eps, dtype)
        names = ("query_key_value", "dense")
        self.attention = FusedAttention(config, dtype, layer, names, bias=bias, output_bias=bias)
        names = ("dense_h_to_4h", "dense_4h_to_h")
        self.mlp = MLP(size, config.intermediate_size, dtype, config.hidden_act, names)
        for name in names:
            # As MLC LLM stores them.
            linear = getattr(self.mlp, name)
            linear.bias = nn.Parameter(linear.bias.shape, "float32")

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        attended = ops.add(x, self.attention(self.input_layernorm(x), kv, layer))
        source = x if self.is_parallel else attended
        return ops.add(attended, self.mlp(self.post_attention_layernorm(source)))


class GPTNeoXModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: GPTNeoXConfig, dtype: str) -> None:
        super().__init__()
        self.embed_in = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(
            [GPTNeoXLayer(config, dtype, layer) for layer in range(config.num_hidden_layers)]
        )
        self.final_layer_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype)


class GPTNeoX(CausalLM):
    """GPT-NeoX with its output layer."""

    def __init__(self, config: GPTNeoXConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self.gpt_neox = GPTNeoXModel(config, dtype)
        self.embed_out = Linear(config.hidden_size, config.vocab_size, dtype)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        x = self.gpt_neox.embed_in(token_ids)
        for index, layer in enumerate(self.gpt_neox.layers):
            x = layer(x, kv, index)
        return x

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.gpt_neox.final_layer_norm(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.embed_out(rows)


def _special(config: GPTNeoXConfig, parameter: str) -> ParamRule | None:
    # Checkpoints keep q, k and v of a head together.
    if ".query_key_value." in parameter:
        size = config.head_dim
        return ParamRule((parameter,), regroup_qkv(config.num_attention_heads, (size, size, size)))
    if parameter == "embed_out.weight" and config.tie_word_embeddings:
        return ParamRule(("gpt_neox.embed_in.weight",))
    return None


FAMILY = Family("gpt_neox", ("GPTNeoXForCausalLM",), GPTNeoXConfig, GPTNeoX, special=_special)
