"""Phi-3-vision and Phi-3.5-vision: CLIP sees an image whole and in tiles, Phi-3 speaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.processing import PROCESSOR_KEY
from mlc_llm.images.tiles import NUM_MARKS, ORDERS, TileProcessing
from mlc_llm.models.base import CausalLM, DecoderLM, Family, build_decoder
from mlc_llm.models.clip import LARGE_336, ClipConfig, ClipTower
from mlc_llm.models.phi3 import Phi3Config, attention
from mlc_llm.models.rules import renamed
from mlc_llm.models.vision import VisionLM
from mlc_llm.nn import image_ops, row_ops
from mlc_llm.nn.decoder import Decoder, DecoderNames
from mlc_llm.nn.linear import Linear

_NAMES = DecoderNames(embed_tokens="embd", layers="h", attention="mixer", attention_norm="ln")
# What the image part may be set to, in the fields of a configuration that say so.
_SUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "embd_layer": {
        "embedding_cls": ("image",),
        "projection_cls": ("mlp",),
        "use_hd_transform": (True,),
        "with_learnable_separator": (True,),
        "hd_transform_order": ORDERS,
    },
    "img_processor": {
        "name": ("clip_vision_model",),
        "layer_idx": (-2,),
        "type_feature": ("patch",),
    },
}


@dataclass(frozen=True)
class Phi3VConfig(Phi3Config):
    """Phi-3's fields, and how images become rows.

    vision_config: the tower, where it is not the usual one. image_token_index: the token that
    stands for rows of images, `<|image|>`. image_processing: see `TileProcessing`.
    """

    vision_config: dict[str, Any] = field(default_factory=dict)
    img_processor: dict[str, Any] = field(default_factory=dict)
    embd_layer: dict[str, Any] = field(default_factory=dict)
    image_token_index: int = 32044
    image_processing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fields in _SUPPORTED.items():
            given = getattr(self, name)
            for key, values in fields.items():
                if (value := given.get(key, values[0])) not in values:
                    raise UnsupportedModel(
                        f"{name}.{key} {value!r:.80} is not supported; supported: "
                        f"{', '.join(map(repr, values))}"
                    )
        if not 0 <= self.image_token_index < self.vocab_size:
            raise CorruptFile(
                f"model configuration: image_token_index {self.image_token_index} is outside the "
                f"vocabulary of {self.vocab_size} tokens"
            )
        tower = self.tower
        if tower.image_size % (2 * tower.patch_size):
            raise UnsupportedModel(
                f"vision configuration: image_size {tower.image_size} is no multiple of two "
                f"patches of {tower.patch_size} pixels"
            )
        if tower.num_hidden_layers < 2:
            raise CorruptFile("vision configuration: num_hidden_layers must be 2 or more, is 1")
        for key, found in (("image_dim_out", tower.hidden_size), ("num_img_tokens", self.num_rows)):
            if (value := self.img_processor.get(key, found)) != found:
                raise CorruptFile(
                    f"model configuration: img_processor.{key} is {value!r:.40}, the tower has "
                    f"{found}"
                )
        if self.image_processing is not None:
            TileProcessing.from_json(self.image_processing, "model configuration")

    @property
    def tower(self) -> ClipConfig:
        """Return the shape of the vision tower."""
        return ClipConfig.read(self.vision_config, LARGE_336)

    @property
    def num_rows(self) -> int:
        """Return how many rows are made of the patches of a tile."""
        return self.tower.num_patches // 4

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        parts = {
            name: config.get(name) or {}
            for name in ("vision_config", "img_processor", "embd_layer")
        }
        token = config.get("image_token_index")
        processing = None
        if (settings := config.get(PROCESSOR_KEY)) is not None:
            num_rows = ClipConfig.read(parts["vision_config"], LARGE_336).num_patches // 4
            where = "preprocessor_config.json"
            processing = TileProcessing.from_huggingface(settings, num_rows, where).to_json()
        return {
            **super().huggingface_fields(config),
            **parts,
            "image_token_index": cls.image_token_index if token is None else token,
            "image_processing": processing,
        }


class _Projection(nn.Module):
    """linear_2(gelu(linear_1(x)))."""

    def __init__(self, config: Phi3VConfig, dtype: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear_1 = Linear(4 * config.tower.hidden_size, width, dtype, bias=True)
        self.linear_2 = Linear(width, width, dtype, bias=True)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Return (rows, hidden) float32."""
        return self.linear_2(row_ops.activate(self.linear_1(x), "gelu"))


class _ImageEmbedding(nn.Module):
    def __init__(self, config: Phi3VConfig, dtype: str) -> None:
        super().__init__()
        width = 4 * config.tower.hidden_size
        self.num_layers = config.tower.num_hidden_layers - 1
        self.img_processor = ClipTower(config.tower, dtype)
        self.img_projection = _Projection(config, dtype)
        self.sub_GN = nn.Parameter((1, 1, 1, width), dtype)
        self.glb_GN = nn.Parameter((1, 1, width), dtype)

    def forward(self, pixels: nn.Tensor) -> nn.Tensor:
        """Return the rows of a view, the end of a line, and what parts the whole from the tiles.

        The projection knows no neighbours, so that rows may be put in order after it.
        """
        states = self.img_processor(pixels, self.num_layers)
        return self.img_projection(image_ops.merge_patches(states, self.sub_GN, self.glb_GN))


class Phi3V(DecoderLM, VisionLM):
    """Phi-3, and beside its decoder what sees."""

    def __init__(
        self, config: Phi3VConfig, dtype: str, model: Decoder, names: DecoderNames
    ) -> None:
        super().__init__(config, dtype, model, names)
        self.phi3_v = config
        self.vision_embed_tokens = _ImageEmbedding(config, dtype)

    @property
    def text(self) -> DecoderLM:
        """Return the model itself, whose decoder lies beside the tower."""
        return self

    @property
    def image_inputs(self) -> ImageInputs:
        """Return what images the model takes."""
        config = self.phi3_v
        settings = config.image_processing
        tiles = TileProcessing() if settings is None else TileProcessing.from_json(settings, "")
        return ImageInputs(
            config.image_token_index,
            config.tower.image_size,
            config.num_rows + NUM_MARKS,
            config.hidden_size,
            max_views=1 + tiles.num_crops,
            tiling=config.embd_layer.get("hd_transform_order", ORDERS[0]),
        )

    def embed_image(self, pixels: nn.Tensor) -> nn.Tensor:
        """Return the rows (num_rows, hidden) float32 of a view (3, size, size) float32."""
        rows: nn.Tensor = self.vision_embed_tokens(pixels)
        return rows


def build(config: Phi3VConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, names=_NAMES, language_model=Phi3V)


FAMILY = Family(
    "phi3_v",
    ("Phi3VForCausalLM",),
    Phi3VConfig,
    build,
    special=renamed(
        ("vision_embed_tokens.", "model.vision_embed_tokens."),
        (".img_projection.linear_1.", ".img_projection.0."),
        (".img_projection.linear_2.", ".img_projection.2."),
        ("model.embd.", "model.embed_tokens."),
        ("model.h.", "model.layers."),
        (".ln.", ".input_layernorm."),
        (".mixer.out_proj.", ".self_attn.o_proj."),
        (".mixer.", ".self_attn."),
    ),
    # The table of tokens once more.
    unused=("model.vision_embed_tokens.wte.",),
)
