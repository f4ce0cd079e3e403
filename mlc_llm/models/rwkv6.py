"""RWKV-6 (Finch): RWKV-5 with mixing and decays that depend on the token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.rwkv5 import (
    Block,
    FeedForward,
    GatedGroupNorm,
    RwkvConfig,
    RwkvLM,
    rule_for,
)
from mlc_llm.nn import recurrent_ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear

# The parts of `time_maa_w2`, in this order: decay, key, value, receptance, gate.
_PARTS = "wkvrg"
_WIDE = 4096  # from this hidden size on, low ranks are twice as large


@dataclass(frozen=True)
class Rwkv6Config(RwkvConfig):
    """Adds the ranks of low-rank matrices, which follow from the hidden size if not given."""

    VERSION: ClassVar[str] = "6_0"

    model_version: str = "6_0"
    time_mix_rank: int = 0
    time_decay_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time_mix_rank", "time_decay_rank"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise CorruptFile(f"model configuration: {name} must be at least 1, is {value!r}")

    @classmethod
    def _completed(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._completed(config)
        scale = 2 if config["hidden_size"] >= _WIDE else 1
        return {
            **fields,
            "time_mix_rank": config.get("time_mix_rank") or 32 * scale,
            "time_decay_rank": config.get("time_decay_rank") or 64 * scale,
        }


class Attention(nn.Module):
    """Linear attention whose decays and token shift depend on the token (Peng et al. 2024)."""

    def __init__(self, config: Rwkv6Config, dtype: str) -> None:
        super().__init__()
        width, mix, decay = config.hidden_size, config.time_mix_rank, config.time_decay_rank
        for part in ("x", *_PARTS):
            setattr(self, f"time_maa_{part}", nn.Parameter((1, 1, width), dtype))
        self.time_maa_w1 = nn.Parameter((width, len(_PARTS) * mix), dtype)
        self.time_maa_w2 = nn.Parameter((len(_PARTS), mix, width), dtype)
        self.time_decay = nn.Parameter((1, 1, width), "float32")
        self.time_decay_w1 = nn.Parameter((width, decay), dtype)
        self.time_decay_w2 = nn.Parameter((decay, width), dtype)
        self.time_faaaa = nn.Parameter((config.num_attention_heads, config.head_size), "float32")
        for part in ("receptance", "key", "value", "gate", "output"):
            setattr(self, part, Linear(width, width, dtype))
        self.ln_x = GatedGroupNorm(config)

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        before = recurrent_ops.token_shift(x, kv, f"attention_shift.{layer}")
        mixed = recurrent_ops.lerp(x, before, self.time_maa_x)
        low = recurrent_ops.tanh(recurrent_ops.linear_in_out(mixed, self.time_maa_w1))
        w, k, v, r, gate = (
            recurrent_ops.low_rank_lerp(
                x, before, low, self.time_maa_w2, getattr(self, f"time_maa_{part}"), index
            )
            for index, part in enumerate(_PARTS)
        )
        low = recurrent_ops.tanh(recurrent_ops.linear_in_out(w, self.time_decay_w1))
        change = recurrent_ops.linear_in_out(low, self.time_decay_w2)
        out = recurrent_ops.wkv(
            self.receptance(r),
            self.key(k),
            self.value(v),
            recurrent_ops.dynamic_decay(change, self.time_decay),
            self.time_faaaa,
            kv,
            f"wkv.{layer}",
            is_dynamic=True,
        )
        return self.output(self.ln_x(out, self.gate(gate)))


class Rwkv6FeedForward(FeedForward):
    """RWKV-5's, with mixing from the other end."""

    def mixed(self, x: nn.Tensor, before: nn.Tensor, name: str) -> nn.Tensor:
        """Return rows mixed with those before them: all x where the parameter is 0."""
        return recurrent_ops.lerp(x, before, getattr(self, name))


def build(config: Rwkv6Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    mixes = ("time_maa_k", "time_maa_r")
    blocks = [
        Block(config, dtype, i, Attention(config, dtype), Rwkv6FeedForward(config, dtype, mixes))
        for i in range(config.num_hidden_layers)
    ]
    return RwkvLM(config, dtype, blocks)


FAMILY = Family("rwkv6", ("Rwkv6ForCausalLM",), Rwkv6Config, build, special=rule_for)
