"""What families share that have a sliding window in some of their layers and none in the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.errors import CorruptFile
from mlc_llm.models.checking import check_layer_types
from mlc_llm.models.llama import LlamaConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class LayerWindowsConfig(LlamaConfig):
    """Llama's fields, and which layers have the window.

    layer_types: Hugging Face's name of each layer's kind. Where it is None or empty, every
    `sliding_window_pattern`-th layer sees all tokens and the others have the window.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"sliding_window_size": ("sliding_window",)}

    layer_types: list[str] | None = None
    sliding_window_pattern: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_types(self.layer_types or None, self.num_hidden_layers, (LOCAL, GLOBAL))
        if self.sliding_window_pattern < 1:
            raise CorruptFile(
                "model configuration: sliding_window_pattern is "
                f"{self.sliding_window_pattern}; it is 1 or more"
            )

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        return {
            **super().huggingface_fields(config),
            "sliding_window_size": config.get("sliding_window_size") or -1,
            "layer_types": config.get("layer_types") or None,
            "sliding_window_pattern": config.get("sliding_window_pattern") or 4,
        }

    def is_local(self, layer: int) -> bool:
        """Return whether a layer has the window, where the model has one."""
        if self.layer_types:
            return self.layer_types[layer] == LOCAL
        return (layer + 1) % self.sliding_window_pattern != 0

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        return super().window_of(layer) if self.is_local(layer) else -1
