"""OLMo 3: OLMo 2 with windows in three layers of four, whose rotary embedding is never scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.models.base import Family
from mlc_llm.models.layer_windows import LayerWindowsConfig
from mlc_llm.models.llama import FUSED
from mlc_llm.models.olmo2 import build
from mlc_llm.nn.rope import RopeConfig


@dataclass(frozen=True)
class Olmo3Config(LayerWindowsConfig):
    """OLMo 2's fields and the windows; `rope_local_base_freq` is the base in layers with one."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0}

    rope_local_base_freq: float | None = None

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        rope = config.get("rope_parameters") or {}
        local = rope.get("sliding_attention") or {}
        if "full_attention" in rope:
            config = {**config, "rope_parameters": rope["full_attention"]}
        base = local.get("rope_theta")
        return {
            **super().huggingface_fields(config),
            "rope_local_base_freq": None if base is None else float(base),
        }

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the embeddings of layers that see all tokens and of those with the window."""
        (whole,) = super().ropes
        base = self.rope_local_base_freq or self.position_embedding_base
        return whole, dataclasses.replace(whole, base=base, scaling=None)

    def rope_of(self, layer: int) -> int | None:
        """Return which of `ropes` a layer uses."""
        return 1 if self.is_local(layer) else 0


FAMILY = Family("olmo3", ("Olmo3ForCausalLM",), Olmo3Config, build, FUSED)
