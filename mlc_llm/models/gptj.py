"""GPT-J: interleaved rotation of some dimensions, halves of a layer side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.nn import ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class GPTJConfig(DecoderConfig):
    """A decoder that rotates the first `rotary_dim` dimensions, neighbours in pairs."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "intermediate_size": ("n_inner",),
        "rms_norm_eps": ("layer_norm_epsilon",),
        "hidden_act": ("activation_function",),
    }

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        hidden_size, heads = config.get("hidden_size") or 0, config.get("num_attention_heads") or 1
        rotary_dim = config.get("rotary_dim") or hidden_size // heads
        named = {
            **config,
            "max_position_embeddings": config.get("n_positions"),
            "intermediate_size": config.get("intermediate_size") or 4 * hidden_size,
            "partial_rotary_factor": rotary_dim * heads / (hidden_size or 1),
        }
        return {
            **super().huggingface_fields(named),
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-5),
            "hidden_act": config.get("hidden_act") or "gelu_new",
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> GPTJConfig:
        """Build from an artifact's `model_config`; MLC LLM's names the rotated dimensions."""
        values = {"hidden_act": "gelu_new", **model_config}
        hidden_size = values.get("hidden_size") or values.get("n_embd") or 0
        heads = values.get("num_attention_heads") or values.get("n_head") or 1
        if (values.get("intermediate_size") or values.get("n_inner") or -1) < 1:
            values["intermediate_size"] = 4 * hidden_size
        if "partial_rotary_factor" not in values and values.get("rotary_dim"):
            values["partial_rotary_factor"] = values["rotary_dim"] * heads / (hidden_size or 1)
        return super().from_json(values)

    def to_json(self) -> dict[str, Any]:
        """Return `model_config` as an artifact stores it."""
        return {**super().to_json(), "rotary_dim": self.rotary_dim}

    @property
    def rotary_dim(self) -> int:
        """Return how many dimensions of a head are rotated."""
        return round(self.head_dim * self.partial_rotary_factor)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding."""
        base, context = self.position_embedding_base, self.context_window_size
        return (RopeConfig(base, self.rotary_dim, None, context, is_interleaved=True),)


class GPTJLayer(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both."""

    def __init__(self, config: GPTJConfig, dtype: str, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.ln_1 = LayerNorm(size, config.rms_norm_eps, dtype)
        names = ("c_attn", "out_proj")
        self.attn = FusedAttention(config, dtype, layer, names, bias=False, output_bias=False)
        names = ("fc_in", "fc_out")
        self.mlp = MLP(size, config.intermediate_size, dtype, config.hidden_act, names)

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        normed = self.ln_1(x)
        return ops.add(ops.add(x, self.attn(normed, kv, layer)), self.mlp(normed))


class GPTJModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: GPTJConfig, dtype: str) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.h = nn.ModuleList(
            [GPTJLayer(config, dtype, layer) for layer in range(config.num_hidden_layers)]
        )
        self.ln_f = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype)


class GPTJ(CausalLM):
    """GPT-J with its output layer, which has a bias."""

    def __init__(self, config: GPTJConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self.transformer = GPTJModel(config, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, bias=True)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        x = self.transformer.wte(token_ids)
        for index, layer in enumerate(self.transformer.h):
            x = layer(x, kv, index)
        return x

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.transformer.ln_f(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.lm_head(rows)


_PARTS = {"attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj")}
FAMILY = Family("gptj", ("GPTJForCausalLM",), GPTJConfig, GPTJ, _PARTS)
