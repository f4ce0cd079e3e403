"""dots.llm1: attention of Qwen3, experts of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import Family
from mlc_llm.models.glm4_moe import PARTS, Glm4MoeConfig, build, special_rule


@dataclass(frozen=True)
class Dots1Config(Glm4MoeConfig):
    """GLM-4.5's fields; layers from `max_window_layers` on have the window, where there is one."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"use_qk_norm": True, "max_window_layers": 62}

    max_window_layers: int = 62

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        if config.get("attention_bias"):
            raise UnsupportedModel("dots.llm1 with biases in its attention is not supported")
        return {
            **super().huggingface_fields(config),
            "sliding_window_size": config.get("sliding_window") or -1,
            "max_window_layers": config["max_window_layers"],
        }

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        return super().window_of(layer) if layer >= self.max_window_layers else -1


FAMILY = Family("dots1", ("Dots1ForCausalLM",), Dots1Config, build, PARTS, special_rule)
