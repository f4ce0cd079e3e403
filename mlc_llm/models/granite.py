"""Granite 3: Llama with factors of embeddings, scores, residuals and logits; some with experts.

Granite 4 has the layers of the last of these, save those that keep a recurrent state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, DecoderLM, Family, build_decoder
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig, llama_mlp
from mlc_llm.models.minicpm import MiniCPMLayer
from mlc_llm.models.mixtral import MixtralMoE
from mlc_llm.models.moe import check_experts, expert_rule
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import ops, row_ops
from mlc_llm.nn.decoder import DecoderNames
from mlc_llm.nn.mlp import GatedMLP
from mlc_llm.nn.ops import Rows

_FACTORS = (
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
)


@dataclass(frozen=True)
class GraniteConfig(LlamaConfig):
    """Llama's fields and the factors; logits are divided by theirs."""

    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logits_scaling:
            raise CorruptFile("model configuration: logits_scaling is 0; logits are divided by it")

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        factors = {name: config[name] for name in _FACTORS if config.get(name) is not None}
        return {**super().huggingface_fields(config), **factors}


@dataclass(frozen=True)
class GraniteMoeConfig(GraniteConfig):
    """Also the number of experts, and the width of one that all tokens share; 0 for none.

    has_split_experts: whether the checkpoint has each expert's tensors alone, as GGUF files do.
    """

    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    shared_intermediate_size: int = 0
    has_split_experts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_local_experts:
            check_experts(self.num_local_experts, self.num_experts_per_tok)
        elif self.shared_intermediate_size < 1:
            raise CorruptFile(
                "model configuration: without experts shared_intermediate_size is the width of "
                f"feed-forward layers, it is {self.shared_intermediate_size}"
            )

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        counts = ("num_local_experts", "num_experts_per_tok", "shared_intermediate_size")
        return {
            **super().huggingface_fields(config),
            **{name: config.get(name) or 0 for name in counts},
            "has_split_experts": bool(config.get("has_split_experts", False)),
        }


@dataclass(frozen=True)
class GraniteHybridConfig(GraniteMoeConfig):
    """Also whether there are positions: "rope" as `position_embedding_type`, else none."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"num_local_experts": 8, "num_experts_per_tok": 2}

    position_embedding_type: str | None = None

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        kinds = config.get("layer_types") or config.get("layers_block_type") or ["mamba"]
        others = sorted({str(kind) for kind in kinds} - {"attention", "full_attention"})
        if others:
            raise UnsupportedModel(
                f"layers of kind {', '.join(others)} are not supported; take a Granite 4 model "
                "whose layers all have attention"
            )
        kind = config.get("position_embedding_type")
        if kind not in ("rope", "nope", None):
            raise UnsupportedModel(f"position_embedding_type {kind!r:.40} is not supported")
        return {**super().huggingface_fields(config), "position_embedding_type": kind}

    def rope_of(self, layer: int) -> int | None:
        """Return 0, or None where there are no positions."""
        return super().rope_of(layer) if self.position_embedding_type == "rope" else None


class GraniteAttention(LlamaAttention):
    """Llama's with a scale of its own."""

    def __init__(self, config: GraniteConfig, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.shape = dataclasses.replace(self.shape, scale=float(config.attention_multiplier))


class GraniteMoE(MixtralMoE):
    """Mixtral's experts, and one that all tokens share."""

    def __init__(self, config: GraniteMoeConfig, dtype: str) -> None:
        routing = Routing(config.num_local_experts, config.num_experts_per_tok)
        super().__init__(config, routing, dtype)
        self.shared_mlp = _shared_mlp(config, dtype) if config.shared_intermediate_size else None

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        mixed = super().forward(x)
        return mixed if self.shared_mlp is None else ops.add(mixed, self.shared_mlp(x))


class GraniteLM(DecoderLM):
    """The usual decoder with factors before and after it."""

    config: GraniteConfig

    def embed(self, token_ids: nn.Tensor) -> nn.Tensor:
        """Return what the first layer gets, (n, hidden) float32."""
        return row_ops.scale(super().embed(token_ids), float(self.config.embedding_multiplier))

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return row_ops.scale(super().logits(rows), 1 / self.config.logits_scaling)


def _shared_mlp(config: GraniteMoeConfig, dtype: str) -> GatedMLP:
    width = config.shared_intermediate_size
    return GatedMLP(config.hidden_size, width, dtype, activation=config.hidden_act)


def _moe_mlp(config: GraniteMoeConfig, dtype: str, layer: int) -> nn.Module:
    del layer
    return GraniteMoE(config, dtype) if config.num_local_experts else _shared_mlp(config, dtype)


def _build(config: GraniteConfig, dtype: str, mlp: Callable[..., nn.Module]) -> CausalLM:
    def layer(
        attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], names: DecoderNames
    ) -> nn.Module:
        del names
        return MiniCPMLayer(attention, mlp, norm, float(config.residual_multiplier))

    return build_decoder(
        config, dtype, GraniteAttention, mlp, layer=layer, language_model=GraniteLM
    )


def build(config: GraniteConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return _build(config, dtype, llama_mlp)


def build_moe(config: GraniteMoeConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with experts, with parameters of `dtype`."""
    return _build(config, dtype, _moe_mlp)


# Ends of our names -> checkpoints'; experts are stacked there already.
_MOE_NAMES = {
    "mlp.e1_e3.weight": "block_sparse_moe.input_linear.weight",
    "mlp.e2.weight": "block_sparse_moe.output_linear.weight",
    "mlp.gate.weight": "block_sparse_moe.router.layer.weight",
    "mlp.shared_mlp.gate_up_proj.weight": "shared_mlp.input_linear.weight",
    "mlp.shared_mlp.down_proj.weight": "shared_mlp.output_linear.weight",
    "mlp.gate_up_proj.weight": "shared_mlp.input_linear.weight",
    "mlp.down_proj.weight": "shared_mlp.output_linear.weight",
}


# The same of GGUF files, where they have other names.
_SPLIT_EXPERTS = {"e1_e3": ("gate_proj", "up_proj"), "e2": ("down_proj",)}
_SPLIT_SHARED = {
    "mlp.shared_mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.shared_mlp.down_proj": ("down_proj",),
}


def _split_rule(config: GraniteMoeConfig, parameter: str) -> ParamRule | None:
    path, _, leaf = parameter.rpartition(".")
    for ours, parts in _SPLIT_SHARED.items():
        if path.endswith(ours):
            prefix = path.removesuffix(ours) + "mlp.shared_expert"
            return ParamRule(tuple(f"{prefix}.{part}.{leaf}" for part in parts))
    return expert_rule(parameter, _SPLIT_EXPERTS, config.num_local_experts)


def _moe_rule(config: GraniteMoeConfig, parameter: str) -> ParamRule | None:
    if config.has_split_experts and (rule := _split_rule(config, parameter)) is not None:
        return rule
    for ours, theirs in _MOE_NAMES.items():
        if parameter.endswith(ours):
            return ParamRule((parameter.removesuffix(ours) + theirs,))
    return None


FAMILY = Family("granite", ("GraniteForCausalLM",), GraniteConfig, build, FUSED)
MOE = Family(
    "granitemoe", ("GraniteMoeForCausalLM",), GraniteMoeConfig, build_moe, FUSED, _moe_rule
)
SHARED = dataclasses.replace(
    MOE, name="granitemoeshared", architectures=("GraniteMoeSharedForCausalLM",)
)
HYBRID = dataclasses.replace(
    MOE,
    name="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    config=GraniteHybridConfig,
)
