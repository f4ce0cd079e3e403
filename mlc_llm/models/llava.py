"""LLaVA 1.5 (Liu et al. 2023): CLIP sees, a projector of two layers, Llama speaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.processing import PROCESSOR_KEY, ImageProcessing
from mlc_llm.models import llama
from mlc_llm.models.base import DecoderLM, Family
from mlc_llm.models.clip import LARGE_336, ClipConfig, ClipTower
from mlc_llm.models.config import join_text_config
from mlc_llm.models.llama import FUSED, LlamaConfig
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.vision import VisionLM
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.activations import ACTIVATIONS
from mlc_llm.nn.linear import Linear

_STRATEGIES = ("default", "full")


@dataclass(frozen=True)
class LlavaConfig(LlamaConfig):
    """Llama's fields, which are in `text_config` of files, and how images become rows.

    vision_feature_layer: which hidden states of the tower are taken, counted from 0, before the
    first layer, or from the end, -1 being those after the last. With the strategy "default" the
    class token is left out, with "full" it is a row too. image_processing: see `ImageProcessing`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
    }

    vision_config: dict[str, Any] = field(default_factory=dict)
    image_token_index: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    image_processing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.image_token_index < self.vocab_size:
            raise CorruptFile(
                f"model configuration: image_token_index {self.image_token_index} is outside the "
                f"vocabulary of {self.vocab_size} tokens"
            )
        if self.vision_feature_select_strategy not in _STRATEGIES:
            raise UnsupportedModel(
                f"vision_feature_select_strategy {self.vision_feature_select_strategy!r:.80} is "
                f"not supported; supported: {', '.join(_STRATEGIES)}"
            )
        if self.projector_hidden_act not in ACTIVATIONS:
            raise UnsupportedModel(
                f"projector_hidden_act {self.projector_hidden_act!r:.80} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        count = self.tower.num_hidden_layers
        if not -count - 1 <= self.vision_feature_layer <= count:
            raise CorruptFile(
                f"model configuration: vision_feature_layer is {self.vision_feature_layer}, the "
                f"tower has {count} layers"
            )

    @property
    def tower(self) -> ClipConfig:
        """Return the shape of the vision tower."""
        return ClipConfig.read(self.vision_config, LARGE_336)

    @property
    def num_tower_layers(self) -> int:
        """Return how many layers of the tower images go through."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.tower.num_hidden_layers + 1 + layer

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._with_own_names(join_text_config(config))

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        text = config.get("text_config") or {}
        if (kind := text.get("model_type") or "llama") != "llama":
            raise UnsupportedModel(
                f"LLaVA on a language model of type {kind!r:.80} is not supported; supported: llama"
            )
        layer = config.get("vision_feature_layer", -2)
        if isinstance(layer, list) and len(layer) == 1:
            layer = layer[0]
        if not isinstance(layer, int):
            raise UnsupportedModel(
                f"vision_feature_layer {layer!r:.80} is not supported; it must be one layer"
            )
        token = config.get("image_token_index", config.get("image_token_id"))
        tower = config.get("vision_config") or LARGE_336
        processing = None
        if (settings := config.get(PROCESSOR_KEY)) is not None:
            size = ClipConfig.read(tower, LARGE_336).image_size
            found = ImageProcessing.from_huggingface(settings, size, "preprocessor_config.json")
            processing = found.to_json()
        return {
            **super().huggingface_fields(config),
            "vision_config": dict(tower),
            "image_token_index": 32000 if token is None else token,
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy")
            or "default",
            "projector_hidden_act": config.get("projector_hidden_act") or "gelu",
            "multimodal_projector_bias": config.get("multimodal_projector_bias", True),
            "image_processing": processing,
        }

    def to_json(self) -> dict[str, Any]:
        """Return `model_config` as an artifact stores it; MLC LLM looks into `text_config`."""
        values = super().to_json()
        own = LlavaConfig.__annotations__
        text = {name: value for name, value in values.items() if name not in own}
        return {**values, "text_config": text}


class _Projector(nn.Module):
    """linear_2(act(linear_1(x)))."""

    def __init__(self, config: LlavaConfig, dtype: str) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.multimodal_projector_bias
        self.activation = config.projector_hidden_act
        self.linear_1 = Linear(config.tower.hidden_size, width, dtype, bias)
        self.linear_2 = Linear(width, width, dtype, bias)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Return (rows, hidden) float32."""
        return self.linear_2(row_ops.activate(self.linear_1(x), self.activation))


class Llava(VisionLM):
    """LLaVA with the parts that checkpoints have, the last layer of the tower included."""

    def __init__(self, config: LlavaConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self.llava = config
        self.vision_tower = ClipTower(config.tower, dtype)
        self.multi_modal_projector = _Projector(config, dtype)
        language_model = llama.build(config, dtype)
        assert isinstance(language_model, DecoderLM)
        self.language_model = language_model

    @property
    def image_inputs(self) -> ImageInputs:
        """Return what images the model takes."""
        config, tower = self.llava, self.llava.tower
        has_class = config.vision_feature_select_strategy == "full"
        num_rows = tower.num_patches + has_class
        return ImageInputs(config.image_token_index, tower.image_size, num_rows, config.hidden_size)

    def embed_image(self, pixels: nn.Tensor) -> nn.Tensor:
        """Return the rows (num_rows, hidden) float32 of an image (3, size, size) float32."""
        states = self.vision_tower(pixels, self.llava.num_tower_layers)
        if self.llava.vision_feature_select_strategy == "default":
            patches = np.arange(1, int(states.shape[0]), dtype=np.int32)
            states = ops.take_rows(states, nn.Tensor.from_const(patches))
        return self.multi_modal_projector(states)


def build(config: LlavaConfig, dtype: str) -> Llava:
    """Build the unquantized module with parameters of `dtype`."""
    return Llava(config, dtype)


def _special(config: LlavaConfig, parameter: str) -> ParamRule | None:
    """Return the rule of the tower's parameters, which MLC LLM calls as CLIP alone does."""
    del config
    prefix = "vision_tower.vision_model."
    if not parameter.startswith(prefix):
        return None
    return ParamRule(("vision_tower." + parameter.removeprefix(prefix),))


# Releases of transformers put other words before the same names.
_SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("vision_tower.vision_model.", "vision_tower."),
)
FAMILY = Family(
    "llava",
    ("LlavaForConditionalGeneration",),
    LlavaConfig,
    build,
    FUSED,
    special=_special,
    spellings=_SPELLINGS,
)
