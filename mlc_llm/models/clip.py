"""CLIP's vision tower (Radford et al. 2021): an image becomes a hidden state for each patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.kernels.cpu.attention import AttentionShape
from mlc_llm.models.base import PAGE_SIZE
from mlc_llm.models.checking import check_fields
from mlc_llm.nn import image_ops, ops, row_ops
from mlc_llm.nn.activations import ACTIVATIONS
from mlc_llm.nn.image_ops import Unquantized
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm

# Far above any tower; a damaged file may claim anything.
_LARGEST = {"num_hidden_layers": 1 << 10, "image_size": 1 << 13}
# ViT-L/14 for 336 pixels: what models take whose configurations only name it, or leave it out.
LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class ClipConfig:
    """Shape of a tower, with Hugging Face's names. Sizes of images and patches are in pixels."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            value, largest = getattr(self, field.name), _LARGEST.get(field.name, 1 << 20)
            if isinstance(value, int) and not 1 <= value <= largest:
                raise CorruptFile(
                    f"vision configuration: {field.name} must be from 1 to {largest:,}, is "
                    f"{value!r:.40}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise UnsupportedModel(
                f"vision configuration: hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise CorruptFile(
                f"vision configuration: patch_size {self.patch_size} is more than image_size "
                f"{self.image_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UnsupportedModel(
                f"vision configuration: activation {self.hidden_act!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )

    @property
    def num_patches(self) -> int:
        """Return how many patches an image has."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def read(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> ClipConfig:
        """Build from a `vision_config`; defaults: of the model around the tower.

        Raises CorruptFile, and UnsupportedModel for a tower of another kind.
        """
        kind = config.get("model_type") or "clip_vision_model"
        if kind != "clip_vision_model":
            raise UnsupportedModel(
                f"vision tower {kind!r:.80} is not supported; supported: clip_vision_model"
            )
        if (channels := config.get("num_channels") or 3) != 3:
            raise UnsupportedModel(f"images of {channels!r:.40} channels are not supported; use 3")
        values = {**defaults, **{k: v for k, v in config.items() if v is not None}}
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


class _Table(nn.Module):
    """Weights that are read as they are."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(shape, dtype)


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig, dtype: str) -> None:
        super().__init__()
        width, size = config.hidden_size, config.patch_size
        self.width, self.patch_size = width, size
        self.class_embedding = nn.Parameter((width,), dtype)
        self.patch_embedding = _Table((width, 3, size, size), dtype)
        self.position_embedding = _Table((config.num_patches + 1, width), dtype)

    def forward(self, pixels: nn.Tensor) -> nn.Tensor:
        """Return (patches + 1, width) float32, the class token first."""
        patches = image_ops.cut_patches(pixels, self.patch_size)
        # A convolution whose steps are as wide as its filter is a product with each patch.
        filters = nn.op.reshape(self.patch_embedding.weight, (self.width, int(patches.shape[1])))
        patches = ops.linear_packed(patches, ops.pack_linear(filters), None, self.width)
        return image_ops.add_places(patches, self.class_embedding, self.position_embedding.weight)


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig, dtype: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.shape = attention_shape(config)
        self.q_proj = Linear(width, width, dtype, bias=True)
        self.k_proj = Linear(width, width, dtype, bias=True)
        self.v_proj = Linear(width, width, dtype, bias=True)
        self.out_proj = Linear(width, width, dtype, bias=True)

    def forward(self, x: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (tokens, width) float32."""
        qkv = row_ops.join(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        # Keys and values of the layer before are not needed any more: all layers share pages.
        return self.out_proj(kv.attend(0, qkv, self.shape, rope=None))


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig, dtype: str) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps, dtype)
        self.self_attn = _Attention(config, dtype)
        self.layer_norm2 = LayerNorm(width, eps, dtype)
        self.mlp = MLP(width, config.intermediate_size, dtype, config.hidden_act, ("fc1", "fc2"))

    def forward(self, x: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Return (tokens, width) float32."""
        x = ops.add(x, self.self_attn(self.layer_norm1(x), kv))
        return ops.add(x, self.mlp(self.layer_norm2(x)))


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig, dtype: str) -> None:
        super().__init__()
        layers = [_Layer(config, dtype) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)


class _Transformer(nn.Module):
    def __init__(self, config: ClipConfig, dtype: str) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = _Embeddings(config, dtype)
        self.pre_layrnorm = LayerNorm(width, eps, dtype)  # as CLIP spells it
        self.encoder = _Encoder(config, dtype)
        self.post_layernorm = LayerNorm(width, eps, dtype)


class ClipTower(Unquantized):
    """The tower, whole as it is stored; how many layers run is the caller's choice."""

    def __init__(self, config: ClipConfig, dtype: str) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _Transformer(config, dtype)

    def forward(self, pixels: nn.Tensor, num_layers: int) -> nn.Tensor:
        """Return the hidden states after `num_layers` layers, the class token's first.

        pixels: (3, size, size) float32 -> (patches + 1, width) float32.
        """
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(pixels))
        kv = image_ops.whole_sequence(pixels, int(x.shape[0]), attention_shape(self.config))
        for index, layer in enumerate(model.encoder.layers):
            if index < num_layers:
                x = layer(x, kv)
        return x


def attention_shape(config: ClipConfig) -> AttentionShape:
    """Return the attention of a layer."""
    head_dim = config.hidden_size // config.num_attention_heads
    return AttentionShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        page_size=PAGE_SIZE,
        kv_dtype="float32",
        scale=head_dim**-0.5,
        window=-1,
    )
