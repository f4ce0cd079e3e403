"""SmolLM3: Llama with layers that know no positions, every fourth (Yang et al. 2025, RNoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlc_llm.errors import CorruptFile
from mlc_llm.models.base import Family
from mlc_llm.models.layer_windows import LayerWindowsConfig
from mlc_llm.models.llama import FUSED, build


@dataclass(frozen=True)
class SmolLM3Config(LayerWindowsConfig):
    """Which layers have positions, and windows in the others if `use_sliding_window`.

    no_rope_layers: 1 for a layer with positions, 0 for one without; None for the usual pattern, in
    which every `no_rope_layer_interval`-th has none.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"rope_theta": 2e6, "tie_word_embeddings": True}

    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        found, count = self.no_rope_layers, self.num_hidden_layers
        if found is not None and (not isinstance(found, list) or len(found) < count):
            raise CorruptFile(
                f"model configuration: no_rope_layers must be a list of {count}, is {found!r:.80}"
            )
        if self.no_rope_layer_interval < 1:
            raise CorruptFile(
                "model configuration: no_rope_layer_interval is "
                f"{self.no_rope_layer_interval}; it is 1 or more"
            )

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        fields = super().huggingface_fields(config)
        if not config.get("use_sliding_window"):
            fields["sliding_window_size"] = -1
        return {
            **fields,
            "no_rope_layers": config.get("no_rope_layers"),
            "no_rope_layer_interval": config.get("no_rope_layer_interval") or 4,
        }

    def rope_of(self, layer: int) -> int | None:
        """Return 0 for layers with positions, None for others."""
        if self.no_rope_layers is not None:
            return 0 if self.no_rope_layers[layer] else None
        return 0 if (layer + 1) % self.no_rope_layer_interval else None

    def is_local(self, layer: int) -> bool:
        """Return whether a layer has the window: where nothing is said, one without positions."""
        return super().is_local(layer) if self.layer_types else self.rope_of(layer) is None


FAMILY = Family("smollm3", ("SmolLM3ForCausalLM",), SmolLM3Config, build, FUSED)
