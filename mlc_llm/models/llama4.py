"""Llama 4, its text part: chunks of attention, layers without positions, experts one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, OptionError, UnsupportedModel
from mlc_llm.kernels.cpu.query_scale import QueryScale
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.checking import check_layer_types
from mlc_llm.models.config import join_text_config
from mlc_llm.models.llama import FUSED, LlamaConfig, attention_shape
from mlc_llm.models.moe import check_experts, expert_rule, outputs_first
from mlc_llm.models.plan import ParamRule
from mlc_llm.models.rules import beside_images
from mlc_llm.nn import expert_ops, ops, row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.moe import Experts
from mlc_llm.nn.norm import unit_heads
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig

_CHUNKED, _GLOBAL = "chunked_attention", "full_attention"


@dataclass(frozen=True)
class Llama4Config(LlamaConfig):
    """Which layers have positions, chunks and experts; `intermediate_size` is that of an expert.

    Lists that are None or empty stand for the usual pattern: every `interleave_moe_layer_step`-th
    layer has experts, every `no_rope_layer_interval`-th has neither positions nor chunks, and
    queries there grow with the length of the text. no_rope_layers: 1 for a layer with positions.
    Models that see images have these fields in `text_config`, and leave out what is usual.
    has_split_experts: whether the checkpoint has each expert's tensors alone, as GGUF files do.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 202048,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
    }

    intermediate_size_mlp: int = 0
    num_local_experts: int = 0
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    no_rope_layers: list[int] | None = None
    layer_types: list[str] | None = None
    attention_chunk_size: int | None = None
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: float = 8192
    attn_scale: float = 0.1
    has_split_experts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.intermediate_size_mlp, self.interleave_moe_layer_step)
        check_experts(self.num_local_experts, self.num_experts_per_tok, *sizes)
        self._check_layers()
        chunk = self.attention_chunk_size
        if chunk is not None and chunk < 1:
            raise CorruptFile(
                f"model configuration: attention_chunk_size is {chunk}; it is 1 or more"
            )
        if self.floor_scale < 1 or self.floor_scale != int(self.floor_scale):
            raise CorruptFile(
                f"model configuration: floor_scale is {self.floor_scale}; it is a number of tokens"
            )
        if self.sliding_window_size > 0:
            raise OptionError(
                f"sliding_window_size={self.sliding_window_size} is not supported: layers of "
                "Llama 4 have chunks in place of windows; leave it out"
            )
        if self.use_qk_norm and any(rope.table_scale != 1 for rope in self.ropes):
            raise UnsupportedModel(
                f"use_qk_norm is not supported with rope_scaling {self.rope_scaling!r:.80}"
            )

    def _check_layers(self) -> None:
        """Raise CorruptFile unless lists of layers name layers, or something of each."""
        layers = self.num_hidden_layers
        check_layer_types(self.layer_types or None, layers, (_CHUNKED, _GLOBAL))
        found = self.no_rope_layers
        if found and (not isinstance(found, list) or len(found) != layers):
            raise CorruptFile(
                f"model configuration: no_rope_layers must be a list of {layers}, is {found!r:.80}"
            )
        numbers = self.moe_layers if self.moe_layers is not None else []
        if not isinstance(numbers, list) or not set(numbers) <= set(range(layers)):
            raise CorruptFile(f"model configuration: moe_layers is {self.moe_layers!r:.80}")
        if self.no_rope_layer_interval < 1:
            raise CorruptFile(
                "model configuration: no_rope_layer_interval is "
                f"{self.no_rope_layer_interval}; it is 1 or more"
            )

    @classmethod
    def _with_own_names(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._with_own_names(join_text_config(config))

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        own = {
            field.name: config[field.name]
            for field in dataclasses.fields(cls)
            if field.name in Llama4Config.__annotations__ and config.get(field.name) is not None
        }
        # Null means no chunks; only where nothing is said are they of the usual size.
        own["attention_chunk_size"] = config.get("attention_chunk_size", 8192)
        # Some publish a number for "yes".
        for name in ("attn_temperature_tuning", "use_qk_norm"):
            own[name] = bool(own[name])
        return {**super().huggingface_fields(config), **own}

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return the rotary embedding of neighbours."""
        return tuple(dataclasses.replace(rope, is_interleaved=True) for rope in super().ropes)

    def rope_of(self, layer: int) -> int | None:
        """Return 0 for layers with positions, None for others."""
        if self.no_rope_layers:
            return 0 if self.no_rope_layers[layer] else None
        return 0 if (layer + 1) % self.no_rope_layer_interval else None

    def window_of(self, layer: int) -> int:
        """Return the size of a layer's chunks, -1 where one holds all that fits the context."""
        if self.layer_types:
            is_chunked = self.layer_types[layer] == _CHUNKED
        else:
            is_chunked = self.rope_of(layer) is not None
        chunk = self.attention_chunk_size or self.context_window_size
        return chunk if is_chunked and chunk < self.context_window_size else -1

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts; others have a feed-forward layer like Llama's."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0

    @property
    def query_scale(self) -> QueryScale | None:
        """Return how queries grow in layers without positions, None where all factors are 1."""
        if not self.attn_temperature_tuning or self.context_window_size < self.floor_scale:
            return None
        return QueryScale(self.attn_scale, int(self.floor_scale), 1)


class Llama4Attention(nn.Module):
    """Grouped-query attention within chunks or, without positions, over all tokens.

    MLC LLM keeps q, k and v apart.
    """

    def __init__(self, config: Llama4Config, dtype: str, layer: int) -> None:
        super().__init__()
        self.shape = dataclasses.replace(
            attention_shape(config, layer), is_chunked=config.window_of(layer) > 0
        )
        self.rope, has_positions = config.rope_of(layer), config.rope_of(layer) is not None
        self.eps, self.has_norms = config.rms_norm_eps, config.use_qk_norm and has_positions
        self.query_scale = None if has_positions else config.query_scale
        hidden_size, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.width, kv_width = (
            config.num_attention_heads * head_dim,
            config.num_key_value_heads * head_dim,
        )
        self.q_proj = Linear(hidden_size, self.width, dtype, bias)
        self.k_proj = Linear(hidden_size, kv_width, dtype, bias)
        self.v_proj = Linear(hidden_size, kv_width, dtype, bias)
        self.o_proj = Linear(self.width, hidden_size, dtype, bias)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = row_ops.join(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if self.has_norms:
            # The order of norm and rotation does not matter: a rotation keeps lengths.
            qkv = unit_heads(qkv, self.eps, self.shape)
        if self.query_scale is not None:
            qkv = row_ops.scale_queries(qkv, kv.positions, self.width, self.query_scale)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope))


class Llama4Experts(nn.Module):
    """The weights of all experts of a layer."""

    def __init__(self, config: Llama4Config, dtype: str) -> None:
        super().__init__()
        hidden, width, count = (
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
        )
        self.gate_up_proj = Experts(count, hidden, 2 * width, dtype)
        self.down_proj = Experts(count, width, hidden, dtype)


class Llama4MoE(nn.Module):
    """The expert of the highest logit, which gets its input times the sigmoid of that logit, and
    an expert that all tokens share.
    """

    def __init__(self, config: Llama4Config, dtype: str) -> None:
        super().__init__()
        hidden, width, count = (
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
        )
        self.routing = Routing(count, config.num_experts_per_tok, "sigmoid", renormalize=False)
        self.activation = config.hidden_act
        self.router = Linear(hidden, count, dtype)
        self.experts = Llama4Experts(config, dtype)
        self.shared_expert = GatedMLP(hidden, width, dtype, activation=self.activation)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        routes = expert_ops.route(self.router(x), self.routing)
        # A factor of the input is one of the product.
        gate_up = expert_ops.weigh(self.experts.gate_up_proj(x, routes), routes)
        inner = row_ops.gated(gate_up, self.activation)
        out = self.experts.down_proj(inner, routes, is_pairs=True)
        mixed = expert_ops.mix(out, routes, is_weighted=False)
        return ops.add(mixed, self.shared_expert(x))


def _mlp(config: Llama4Config, dtype: str, layer: int) -> nn.Module:
    if config.has_experts(layer):
        return Llama4MoE(config, dtype)
    width = config.intermediate_size_mlp
    return GatedMLP(config.hidden_size, width, dtype, activation=config.hidden_act)


def build(config: Llama4Config, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(
        config, dtype, Llama4Attention, _mlp, names=DecoderNames(mlp="feed_forward")
    )


_EXPERT_PARTS = {
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}


def _special(config: Llama4Config, parameter: str) -> ParamRule | None:
    if config.has_split_experts:
        return expert_rule(parameter, _EXPERT_PARTS, config.num_local_experts)
    is_stacked = ".experts." in parameter
    return ParamRule((parameter.removesuffix(".weight"),), outputs_first) if is_stacked else None


_GATE_UP = FUSED["mlp.gate_up_proj"]
_PARTS = {
    path + ".gate_up_proj": tuple(name.replace("mlp", path) for name in _GATE_UP)
    for path in ("feed_forward", "feed_forward.shared_expert")
}
TEXT = Family("llama4_text", ("Llama4ForCausalLM",), Llama4Config, build, _PARTS, _special)
FAMILY = Family(
    "llama4",
    ("Llama4ForConditionalGeneration",),
    Llama4Config,
    build,
    special=beside_images(TEXT),
    unused=("vision_model.", "multi_modal_projector."),
)
