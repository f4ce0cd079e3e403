"""Qwen, the first: Llama under GPT-2's names, with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import OptionError, UnsupportedModel
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.nn import row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.ops import Rows

_NAMES = DecoderNames(
    model="transformer",
    embed_tokens="wte",
    layers="h",
    norm="ln_f",
    attention="attn",
    attention_norm="ln_1",
    mlp_norm="ln_2",
)


@dataclass(frozen=True)
class QwenConfig(DecoderConfig):
    """A decoder; `intermediate_size` is that of gate and up together.

    Beyond `seq_length` tokens, what was trained, the program beside the weights turns faster
    (use_dynamic_ntk) or scales queries (use_logn_attn), by the length of each prompt. That is not
    computed here: the context window of such models ends there.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "head_dim": ("kv_channels",),
        "position_embedding_base": ("rotary_emb_base",),
        "partial_rotary_factor": ("rotary_pct",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    }

    seq_length: int = 0
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intermediate_size % 2:
            raise UnsupportedModel(
                f"intermediate_size is that of gate and up, {self.intermediate_size} is odd"
            )
        if self.is_bounded and self.context_window_size > self.seq_length:
            raise OptionError(
                f"context_window_size={self.context_window_size} is not supported: beyond "
                f"{self.seq_length} tokens this model needs dynamic NTK or log n attention"
            )

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        wanted = {"no_bias": True, "scale_attn_weights": True}
        for name, value in wanted.items():
            if bool(config.get(name, value)) != value:
                raise UnsupportedModel(f"{name}={config[name]} is not supported")
        own = {
            "seq_length": config.get("seq_length") or 8192,
            "use_dynamic_ntk": bool(config.get("use_dynamic_ntk", True)),
            "use_logn_attn": bool(config.get("use_logn_attn", True)),
        }
        longest = config.get("max_position_embeddings") or own["seq_length"]
        if own["use_dynamic_ntk"] or own["use_logn_attn"]:
            longest = min(longest, own["seq_length"])
        fields = super().huggingface_fields(
            {
                **config,
                "max_position_embeddings": longest,
                "rope_theta": config.get("position_embedding_base"),
            }
        )
        return {**fields, **own}

    @property
    def is_bounded(self) -> bool:
        """Return whether more tokens than `seq_length` would be computed in another way."""
        return self.seq_length > 0 and (self.use_dynamic_ntk or self.use_logn_attn)


class QwenMLP(nn.Module):
    """c_proj(w1(x) * act(w2(x))), w1 and w2 fused along the output in this order."""

    def __init__(self, config: QwenConfig, dtype: str, layer: int) -> None:
        super().__init__()
        del layer
        self.activation, width = config.hidden_act, config.intermediate_size // 2
        self.gate_up_proj = Linear(config.hidden_size, 2 * width, dtype)
        self.c_proj = Linear(width, config.hidden_size, dtype)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        joined = self.gate_up_proj(x)
        return self.c_proj(row_ops.gated(joined, self.activation, is_gate_first=False))


def _attention(config: QwenConfig, dtype: str, layer: int) -> FusedAttention:
    return FusedAttention(config, dtype, layer, ("c_attn", "c_proj"), output_bias=False)


def build(config: QwenConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, _attention, QwenMLP, names=_NAMES)


FAMILY = Family(
    "qwen",
    ("QWenLMHeadModel",),
    QwenConfig,
    build,
    {"mlp.gate_up_proj": ("mlp.w1", "mlp.w2")},
)
