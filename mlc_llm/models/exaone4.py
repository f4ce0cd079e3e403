"""EXAONE 4: OLMo 2 with q and k normalised head by head; windows in most layers of large models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.layer_windows import GLOBAL, LOCAL, LayerWindowsConfig
from mlc_llm.models.llama import FUSED, LlamaAttention
from mlc_llm.models.olmo2 import Olmo2Layer
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class Exaone4Config(LayerWindowsConfig):
    """Where some layers have a window, only these have positions.

    `config.json` may give the pattern as letters, L for a layer with the window and G for one
    without, which repeat; the last layer has none.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}

    is_hybrid: bool = True

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        pattern, kinds = config.get("sliding_window_pattern"), config.get("layer_types")
        if isinstance(pattern, str) and not kinds:
            count = min(int(config["num_hidden_layers"]), 1 << 10)
            letters = [pattern[layer % len(pattern)] for layer in range(count - 1)] + ["G"]
            kinds = [LOCAL if letter == "L" else GLOBAL for letter in letters]
        pattern = None if isinstance(pattern, str) else pattern
        fields = {**config, "layer_types": kinds, "sliding_window_pattern": pattern}
        is_hybrid = config.get("sliding_window_size") is not None
        return {**super().huggingface_fields(fields), "is_hybrid": is_hybrid}

    def rope_of(self, layer: int) -> int | None:
        """Return 0 for layers with positions, None for others."""
        return 0 if self.is_local(layer) or not self.is_hybrid else None


class Exaone4Attention(LlamaAttention):
    """Llama's with queries and keys normalised head by head."""

    def __init__(self, config: Exaone4Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = norm_heads(self.qkv_proj(x), self.q_norm, self.k_norm, self.shape)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


def build(config: Exaone4Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Exaone4Attention, layer=Olmo2Layer)


FAMILY = Family("exaone4", ("Exaone4ForCausalLM",), Exaone4Config, build, FUSED)
