"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlc_llm.models import llama
from mlc_llm.models.base import Family
from mlc_llm.models.llama import LlamaConfig


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Llama's fields; `sliding_window` may be null."""

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {
            **super().huggingface_fields(config),
            "sliding_window_size": config.get("sliding_window") or -1,
        }


FAMILY = Family("mistral", ("MistralForCausalLM",), MistralConfig, llama.build, llama.FUSED)
