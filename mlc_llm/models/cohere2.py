"""Cohere's Command R7B and Command A: Command R with windows, and no positions beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mlc_llm.models.base import Family
from mlc_llm.models.cohere import PARTS, CohereConfig, build
from mlc_llm.models.layer_windows import LayerWindowsConfig


@dataclass(frozen=True)
class Cohere2Config(LayerWindowsConfig, CohereConfig):
    """The fields of both; every fourth layer sees all tokens, where nothing else is said."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **CohereConfig.ALIASES,
        **LayerWindowsConfig.ALIASES,
    }

    def rope_of(self, layer: int) -> int | None:
        """Return 0 for layers with the window, None for others."""
        return 0 if self.is_local(layer) else None


FAMILY = Family("cohere2", ("Cohere2ForCausalLM",), Cohere2Config, build, PARTS)
