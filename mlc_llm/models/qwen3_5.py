"""Qwen3.5, text part: three layers with a gated delta rule for each one with gated attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.artifact import KVCacheLayout, TensorSpec
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.kernels.cpu.delta_rule import DeltaShape
from mlc_llm.models.base import CausalLM, DecoderLM, Family, build_decoder, pre_norm_layer
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.llama import attention_shape
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.qwen2 import PARTS
from mlc_llm.nn import recurrent_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.norm import RMSNorm, norm_heads
from mlc_llm.nn.ops import Rows

LINEAR, FULL = "linear_attention", "full_attention"
_INTERVAL = 4  # one layer of so many has full attention, where nothing else is said
# Norms that checkpoints keep as the difference to 1; that of linear attention is kept as it is.
_NORMS = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
_DELTA_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


@dataclass(frozen=True)
class Qwen35Config(DecoderConfig):
    """Kinds of layers and the sizes of linear attention.

    tensor_prefix: what the names of tensors begin with in the checkpoint.
    """

    attention_bias: bool = False
    layer_types: list[str] = field(default_factory=list)
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    tensor_prefix: str = "model."

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _DELTA_SIZES:
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise CorruptFile(f"model configuration: {name} must be at least 1, is {value!r}")
        if self.linear_conv_kernel_dim < 2:
            raise UnsupportedModel("linear_conv_kernel_dim must be at least 2, it is 1")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise UnsupportedModel(
                f"{self.linear_num_value_heads} value heads cannot share "
                f"{self.linear_num_key_heads} key heads of linear attention evenly"
            )
        kinds = self.layer_types
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {LINEAR, FULL}:
            raise CorruptFile(
                f"model configuration: layer_types must say {LINEAR} or {FULL} for each of "
                f"{self.num_hidden_layers} layers, it is {kinds!r:.80}"
            )
        if self.hidden_act not in ("silu", "swish"):
            raise UnsupportedModel(f"activation {self.hidden_act!r} is not supported; use silu")

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`, of a text model or one with images."""
        text = config.get("text_config")
        if isinstance(text, Mapping):
            tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            fields = cls.huggingface_fields({**text, "tie_word_embeddings": tied})
            return {**fields, "tensor_prefix": "model.language_model."}
        if config.get("attn_output_gate") is False:
            raise UnsupportedModel("Qwen3.5 without gates in its attention is not supported")
        share = config.get("partial_rotary_factor")
        config = {**config, "partial_rotary_factor": 0.25 if share is None else share}
        return {
            **super().huggingface_fields(config),
            **_delta_fields(config),
            "attention_bias": bool(config.get("attention_bias", False)),
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> Qwen35Config:
        """Build from an artifact's `model_config`. Raises CorruptFile."""
        known = {"partial_rotary_factor": 0.25, **model_config}
        return super().from_json({**known, **_delta_fields(known)})

    def is_linear(self, layer: int) -> bool:
        """Return whether a layer has linear attention, and so a state in place of K and V."""
        return self.layer_types[layer] == LINEAR

    @property
    def delta_shape(self) -> DeltaShape:
        """Return the heads of linear attention."""
        return DeltaShape(
            self.linear_num_key_heads,
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
        )


def _delta_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: config[name] for name in _DELTA_SIZES if config.get(name) is not None}
    kinds = config.get("layer_types")
    if not kinds:
        interval = int(config.get("full_attention_interval") or _INTERVAL)
        count = int(config.get("num_hidden_layers") or 0)
        kinds = [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(count)]
    return {**fields, "layer_types": list(kinds)}


class GatedAttention(nn.Module):
    """Qwen3's attention whose output is gated; the gate of a head lies behind its query."""

    def __init__(self, config: Qwen35Config, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape = attention_shape(config, layer)
        # Only layers like this one have pages.
        self.kv_layer = sum(not config.is_linear(index) for index in range(layer))
        width, bias = config.num_attention_heads * config.head_dim, config.attention_bias
        self.c_attn = Linear(config.hidden_size, config.qkv_features + width, dtype, bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.o_proj = Linear(width, config.hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        del layer
        heads, shape = self.shape.num_heads, self.shape
        gated = self.c_attn(x)
        qkv = recurrent_ops.drop_gates(gated, heads, shape.num_kv_heads, shape.head_dim)
        out = kv.attend(self.kv_layer, norm_heads(qkv, self.q_norm, self.k_norm, shape), shape)
        return self.o_proj(recurrent_ops.gate_heads(out, gated, heads))


class GatedDeltaNet(nn.Module):
    """Linear attention: a short convolution, then the gated delta rule (Yang et al. 2024)."""

    def __init__(self, config: Qwen35Config, dtype: str) -> None:
        super().__init__()
        self.delta = config.delta_shape
        hidden_size, heads = config.hidden_size, self.delta.num_heads
        width = heads * self.delta.value_dim
        self.in_proj_qkv = Linear(hidden_size, self.delta.width, dtype)
        self.in_proj_z = Linear(hidden_size, width, dtype)
        self.in_proj_b = Linear(hidden_size, heads, dtype)
        self.in_proj_a = Linear(hidden_size, heads, dtype)
        taps = config.linear_conv_kernel_dim
        self.conv1d_weight = nn.Parameter((self.delta.width, 1, taps), dtype)
        self.A_log = nn.Parameter((heads,), "float32")
        self.dt_bias = nn.Parameter((heads,), "float32")
        self.norm = RMSNorm(self.delta.value_dim, config.rms_norm_eps, dtype)
        self.out_proj = Linear(width, hidden_size, dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = recurrent_ops.causal_conv(
            self.in_proj_qkv(x), self.conv1d_weight, kv, f"conv.{layer}"
        )
        out = recurrent_ops.gated_delta_rule(
            qkv,
            self.in_proj_a(x),
            self.in_proj_b(x),
            self.A_log,
            self.dt_bias,
            self.delta,
            kv,
            f"delta.{layer}",
        )
        normed = recurrent_ops.gated_rms_norm(
            out, self.in_proj_z(x), self.norm.weight, self.norm.eps
        )
        return self.out_proj(normed)


class HybridLM(DecoderLM):
    """A decoder with K and V of some layers and a state of the others."""

    config: Qwen35Config

    def kv_layout(self) -> KVCacheLayout:
        """Return the pages of the layers with full attention."""
        count = self.config.layer_types.count(FULL)
        return dataclasses.replace(super().kv_layout(), num_layers=count)

    def state_specs(self) -> list[TensorSpec]:
        """Return the last inputs of each convolution and the matrices of the delta rule."""
        config, delta = self.config, self.config.delta_shape
        inputs = (config.linear_conv_kernel_dim - 1, delta.width)
        heads = (delta.num_heads, delta.key_dim, delta.value_dim)
        return [
            TensorSpec(f"{name}.{layer}", shape, "float32")
            for layer in range(config.num_hidden_layers)
            if config.is_linear(layer)
            for name, shape in (("conv", inputs), ("delta", heads))
        ]


def attention(config: Qwen35Config, dtype: str, layer: int) -> nn.Module:
    """Make what mixes the tokens of a layer."""
    if config.is_linear(layer):
        return GatedDeltaNet(config, dtype)
    return GatedAttention(config, dtype, layer)


def decoder_layer(
    mixer: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], names: DecoderNames
) -> nn.Module:
    """Make a layer; checkpoints call linear attention by another name."""
    if isinstance(mixer, GatedDeltaNet):
        names = dataclasses.replace(names, attention="linear_attn")
    return pre_norm_layer(mixer, mlp, norm, names)


def build(config: Qwen35Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, attention, layer=decoder_layer, language_model=HybridLM)


def _add_one(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    result: NDArray[Any] = parts[0].astype(np.float32) + 1
    return result


def rule_for(
    config: Qwen35Config, parameter: str, parts: Mapping[str, tuple[str, ...]] = PARTS
) -> ParamRule:
    """Return how a parameter is made: names with the checkpoint's prefix, norms with 1 added.

    parts: see `Family.fused`.
    """
    source = parameter.replace("model.", config.tensor_prefix, 1)
    source = source.replace("conv1d_weight", "conv1d.weight")
    path, _, leaf = source.rpartition(".")
    for suffix, names in parts.items():
        if path.endswith(suffix):
            prefix = path[: -len(suffix)]
            return ParamRule(tuple(f"{prefix}{name}.{leaf}" for name in names))
    return ParamRule((source,), _add_one) if parameter.endswith(_NORMS) else ParamRule((source,))


UNUSED = ("model.visual.", "mtp.")
FAMILY = Family(
    "qwen3_5",
    ("Qwen3_5ForConditionalGeneration",),
    Qwen35Config,
    build,
    special=rule_for,
    unused=UNUSED,
)
TEXT = dataclasses.replace(
    FAMILY, name="qwen3_5_text", architectures=("Qwen3_5ForCausalLM", "Qwen3_5TextForCausalLM")
)
