"""GPT-2: learned positions, layer norms, a plain feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import transpose
from mlc_llm.nn import ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig

# Switches that change the arithmetic, and what they are in every published model.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """A decoder whose positions are learned vectors; fields are named as OpenAI did."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "intermediate_size": ("n_inner",),
        "rms_norm_eps": ("layer_norm_epsilon",),
        "hidden_act": ("activation_function",),
    }
    num_positions: int = 0

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise UnsupportedModel(f"configuration: {name}={config[name]!r} is not supported")
        positions = config.get("n_positions") or config.get("n_ctx")
        width = config.get("intermediate_size") or 4 * (config.get("hidden_size") or 0)
        named = {**config, "max_position_embeddings": positions, "intermediate_size": width}
        fields = super().huggingface_fields(named)
        return {
            **fields,
            "hidden_act": config.get("hidden_act") or "gelu_new",
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-5),
            "num_positions": fields["context_window_size"],
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> GPT2Config:
        """Build from an artifact's `model_config`; MLC LLM's keeps positions as the context."""
        positions = model_config.get("num_positions") or model_config.get("context_window_size")
        hidden_size = model_config.get("hidden_size") or model_config.get("n_embd") or 0
        width = model_config.get("intermediate_size") or model_config.get("n_inner")
        return super().from_json(
            {
                "hidden_act": "gelu_new",
                **model_config,
                "num_positions": positions,
                "intermediate_size": width if (width or -1) > 0 else 4 * hidden_size,
            }
        )

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return none: positions are added to the embeddings."""
        return ()


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), under GPT-2's names."""

    def __init__(self, config: DecoderConfig, dtype: str, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.ln_1 = LayerNorm(size, eps, dtype)
        self.attn = FusedAttention(config, dtype, layer, ("c_attn", "c_proj"))
        self.ln_2 = LayerNorm(size, eps, dtype)
        self.mlp = MLP(size, config.intermediate_size, dtype, config.hidden_act, ("c_fc", "c_proj"))

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        x = ops.add(x, self.attn(self.ln_1(x), kv, layer))
        return ops.add(x, self.mlp(self.ln_2(x)))


class GPT2Model(nn.Module):
    """Token and position tables, layers and final norm."""

    def __init__(self, config: GPT2Config, dtype: str) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.wpe = Embedding(config.num_positions, config.hidden_size, dtype)
        self.h = nn.ModuleList(
            [GPT2Layer(config, dtype, layer) for layer in range(config.num_hidden_layers)]
        )
        self.ln_f = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (n, hidden) float32 before the final norm."""
        x = ops.add(self.wte(token_ids), self.wpe(kv.positions))
        for index, layer in enumerate(self.h):
            x = layer(x, kv, index)
        return x


class GPT2(CausalLM):
    """GPT-2; MLC LLM's files hold the output layer even where it is the token table."""

    def __init__(self, config: GPT2Config, dtype: str) -> None:
        super().__init__(config, dtype)
        self.transformer = GPT2Model(config, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        return self.transformer(token_ids, kv)

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.transformer.ln_f(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.lm_head(rows)


def tied_head(config: DecoderConfig, parameter: str) -> ParamRule | None:
    """Return where the output layer comes from if it is the token table."""
    is_tied_head = parameter == "lm_head.weight" and config.tie_word_embeddings
    return ParamRule(("transformer.wte.weight",)) if is_tied_head else None


def _special(config: GPT2Config, parameter: str) -> ParamRule | None:
    # GPT-2's checkpoints hold (in, out) matrices.
    if parameter.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return ParamRule((parameter,), transpose)
    return tied_head(config, parameter)


FAMILY = Family(
    "gpt2",
    ("GPT2LMHeadModel",),
    GPT2Config,
    GPT2,
    special=_special,
    base_prefix="transformer.",
    unused=("lm_head.",),
)
