"""Gemma 3, its text part: Gemma 2 with norms of heads and a RoPE for each kind of layer.

Every sixth layer sees all tokens, and has a rotary embedding for long texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import join_text_config
from mlc_llm.models.gemma import norms_plus_one
from mlc_llm.models.gemma2 import Gemma2Config, Gemma2Layer, Gemma2LM, gemma_shape
from mlc_llm.models.llama import FUSED
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import row_ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Gemma 2's fields; `rope_local_base_freq` is the base in layers with the window.

    Models that see images have these fields in `text_config`, and leave out what is usual.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        **Gemma2Config.DEFAULTS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_size": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    }

    rope_local_base_freq: float = 10000.0
    sliding_window_pattern: int = 6

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = join_text_config(config)
        # MLC LLM writes 0 where there is no scaling.
        return super()._with_own_names(
            {**config, "rope_scaling": config.get("rope_scaling") or None}
        )

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        rope = config.get("rope_parameters") or {}
        local = rope.get("sliding_attention") or {}
        base = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
        if "full_attention" in rope:
            config = {**config, "rope_parameters": rope["full_attention"]}
        return {
            **super().huggingface_fields(config),
            "rope_local_base_freq": float(base),
            "sliding_window_pattern": config.get("sliding_window_pattern") or 6,
        }

    def is_local(self, layer: int) -> bool:
        """Return whether a layer has the window: all but every sixth."""
        if self.layer_types:
            return super().is_local(layer)
        return (layer + 1) % self.sliding_window_pattern != 0

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the embeddings of layers that see all tokens and of those with the window."""
        local = RopeConfig(self.rope_local_base_freq, self.rotary_dim)
        return (*super().ropes, local)

    def rope_of(self, layer: int) -> int:
        """Return which of `ropes` a layer uses."""
        return int(self.is_local(layer))


class Gemma3Attention(nn.Module):
    """Grouped-query attention with norms of heads; MLC LLM keeps q, k and v apart."""

    def __init__(self, config: Gemma3Config, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape, self.rope = gemma_shape(config, layer), config.rope_of(layer)
        hidden_size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        width, kv_width = (
            config.num_attention_heads * head_dim,
            config.num_key_value_heads * head_dim,
        )
        self.q_proj = Linear(hidden_size, width, dtype, bias)
        self.k_proj = Linear(hidden_size, kv_width, dtype, bias)
        self.v_proj = Linear(hidden_size, kv_width, dtype, bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype)
        self.o_proj = Linear(width, hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = row_ops.join(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        qkv = norm_heads(qkv, self.q_norm, self.k_norm, self.shape)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


class Gemma3LM(CausalLM):
    """Gemma 2's decoder as `language_model`, as it is called beside a model of images."""

    def __init__(self, config: Gemma3Config, dtype: str) -> None:
        super().__init__(config, dtype)
        self.language_model = build_decoder(
            config, dtype, Gemma3Attention, layer=Gemma2Layer, language_model=Gemma2LM
        )

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        return self.language_model.hidden_states(token_ids, kv)

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.language_model.final_norm(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.language_model.logits(rows)


def _text_special(config: Gemma3Config, parameter: str) -> ParamRule:
    path, _, leaf = parameter.removeprefix("language_model.").rpartition(".")
    if path.endswith("mlp.gate_up_proj"):
        prefix = path.removesuffix("gate_up_proj")
        return ParamRule(tuple(f"{prefix}{part}_proj.{leaf}" for part in ("gate", "up")))
    name = f"{path}.{leaf}"
    return norms_plus_one(config, name) or ParamRule((name,))


FUSED_MLP = {"mlp.gate_up_proj": FUSED["mlp.gate_up_proj"]}
FAMILY = Family(
    "gemma3",
    ("Gemma3ForConditionalGeneration",),
    Gemma3Config,
    Gemma3LM,
    FUSED_MLP,
    special=norms_plus_one,
    unused=("vision_tower.", "multi_modal_projector."),
)
TEXT = Family("gemma3_text", ("Gemma3ForCausalLM",), Gemma3Config, Gemma3LM, special=_text_special)
