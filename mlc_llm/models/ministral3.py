"""Ministral 3, its text part: Mistral with queries that grow with the text, beyond what YaRN saw.

Mistral Small 3.1 and later have the same names and plain queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile
from mlc_llm.kernels.cpu.query_scale import QueryScale
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.config import join_text_config
from mlc_llm.models.llama import FUSED, LlamaAttention, llama_mlp
from mlc_llm.models.mistral import MistralConfig
from mlc_llm.models.rules import beside_images
from mlc_llm.nn import row_ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.ops import Rows

_STRENGTH, _PERIOD = "llama_4_scaling_beta", "original_max_position_embeddings"


@dataclass(frozen=True)
class Ministral3Config(MistralConfig):
    """Mistral's fields, which models that see images have in `text_config`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling = self.rope_scaling or {}
        period, strength = scaling.get(_PERIOD, 1), scaling.get(_STRENGTH, 0)
        if not isinstance(strength, int | float) or not isinstance(period, int) or period < 1:
            raise CorruptFile(
                f"model configuration: rope_scaling has {_STRENGTH}={strength!r:.40} and "
                f"{_PERIOD}={period!r:.40}; they are numbers"
            )

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # Whether the output layer is the table is said of the text; what stands beside it may be a
        # default.
        tied = (config.get("text_config") or {}).get("tie_word_embeddings")
        if tied is not None:
            config = {**config, "tie_word_embeddings": tied}
        return super()._with_own_names(join_text_config(config))

    @property
    def query_scale(self) -> QueryScale | None:
        """Return how queries grow, None where all factors are 1."""
        scaling = self.rope_scaling or {}
        strength = float(scaling.get(_STRENGTH) or 0)
        if not strength or self.context_window_size <= scaling[_PERIOD]:
            return None
        return QueryScale(strength, scaling[_PERIOD])


class Ministral3Attention(LlamaAttention):
    """Llama's with scaled queries."""

    def __init__(self, config: Ministral3Config, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.query_scale = config.query_scale
        self.width = config.num_attention_heads * config.head_dim

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = self.qkv_proj(x)
        if self.query_scale is not None:
            qkv = row_ops.scale_queries(qkv, kv.positions, self.width, self.query_scale)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


def build(config: Ministral3Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, Ministral3Attention, llama_mlp)


TEXT = Family("ministral3_text", ("Ministral3ForCausalLM",), Ministral3Config, build, FUSED)
FAMILY = Family(
    "ministral3",
    ("Mistral3ForConditionalGeneration",),
    Ministral3Config,
    build,
    special=beside_images(TEXT),
    unused=("vision_tower.", "multi_modal_projector."),
)
