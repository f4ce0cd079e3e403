"""gpt-oss: windows in turn, a learned sink in each head's softmax, experts with biases and bounds.

OpenAI 2025, gpt-oss model card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.kernels.cpu.routing import Routing
from mlc_llm.models.base import CausalLM, Family, build_decoder
from mlc_llm.models.checking import check_layer_types
from mlc_llm.models.config import take_int
from mlc_llm.models.llama import FUSED, LlamaAttention, LlamaConfig
from mlc_llm.models.moe import EXPERT_PARTS, check_experts, expert_rule, outputs_first
from mlc_llm.models.plan import ParamRule, concatenate
from mlc_llm.nn import expert_ops, row_ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Linear
from mlc_llm.nn.moe import Experts, mix_experts
from mlc_llm.nn.ops import Rows

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class GptOssConfig(LlamaConfig):
    """Sizes of the experts and bounds of their activation, and which layers have the window.

    layer_types: Hugging Face's name of each layer's kind, None where the first of every two has it.
    has_split_experts: whether the checkpoint has each expert's tensors alone, as GGUF files do.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"sliding_window_size": ("sliding_window",)}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"attention_bias": True, "rms_norm_eps": 1e-5}

    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    layer_types: list[str] | None = None
    has_split_experts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.num_local_experts, self.num_experts_per_tok)
        check_layer_types(self.layer_types, self.num_hidden_layers, (_LOCAL, _GLOBAL))
        if self.swiglu_limit <= 0:
            raise CorruptFile(
                f"model configuration: swiglu_limit is {self.swiglu_limit}; it must be above 0"
            )
        if self.hidden_act != "silu":
            raise UnsupportedModel(f"gpt-oss with hidden_act {self.hidden_act!r} is not supported")

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        given = ("swiglu_alpha", "swiglu_limit", "layer_types", "has_split_experts")
        return {
            **super().huggingface_fields(config),
            **{name: config[name] for name in given if config.get(name) is not None},
            "sliding_window_size": config.get("sliding_window_size") or -1,
            "num_local_experts": take_int(config, "num_local_experts", "num_experts"),
            "num_experts_per_tok": take_int(config, "num_experts_per_tok", "experts_per_token"),
        }

    def window_of(self, layer: int) -> int:
        """Return the window of a layer, -1 for none."""
        is_local = self.layer_types[layer] == _LOCAL if self.layer_types else layer % 2 == 0
        return super().window_of(layer) if is_local else -1


class GptOssAttention(LlamaAttention):
    """Llama's, with one more score in the softmax of each head, which has no value."""

    def __init__(self, config: GptOssConfig, dtype: str, layer: int) -> None:
        super().__init__(config, dtype, layer)
        self.sinks = nn.Parameter((config.num_attention_heads,), dtype)

    def forward(self, x: nn.Tensor | Rows, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        qkv = self.qkv_proj(x)
        return self.o_proj(kv.attend(layer, qkv, self.shape, self.rope, self.sinks))


class GptOssMoE(nn.Module):
    """Experts with biases; a token's are weighted by the softmax of their logits alone."""

    def __init__(self, config: GptOssConfig, dtype: str, layer: int) -> None:
        super().__init__()
        del layer
        hidden, width, count = (
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
        )
        self.routing = Routing(count, config.num_experts_per_tok)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate = Linear(hidden, count, dtype, bias=True)
        self.moe_gate_up_proj = Experts(count, hidden, 2 * width, dtype, bias=True)
        self.moe_down_proj = Experts(count, width, hidden, dtype, bias=True)

    def forward(self, x: nn.Tensor | Rows) -> nn.Tensor:
        """Return (n, hidden) float32."""
        routes = expert_ops.route(self.gate(x), self.routing)
        return mix_experts(
            x,
            routes,
            self.moe_gate_up_proj,
            self.moe_down_proj,
            lambda y: row_ops.bounded_swiglu(y, self.alpha, self.limit),
        )


def build(config: GptOssConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    return build_decoder(config, dtype, GptOssAttention, GptOssMoE)


def _gates_first(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return outputs (experts, 2 * width, ...) as [gate; up], which take turns in checkpoints."""
    return np.concatenate([parts[0][:, 0::2], parts[0][:, 1::2]], axis=1)


def _gates_and_outputs_first(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return _gates_first([parts[0].swapaxes(1, 2)])


_STACKED = {
    "moe_gate_up_proj.weight": ("experts.gate_up_proj", _gates_and_outputs_first),
    "moe_gate_up_proj.bias": ("experts.gate_up_proj_bias", _gates_first),
    "moe_down_proj.weight": ("experts.down_proj", outputs_first),
    "moe_down_proj.bias": ("experts.down_proj_bias", concatenate),
}


def _special(config: GptOssConfig, parameter: str) -> ParamRule | None:
    if config.has_split_experts:
        if parameter.endswith(".sinks"):
            return ParamRule((f"{parameter}.weight",))
        return expert_rule(parameter, EXPERT_PARTS, config.num_local_experts)
    for suffix, (name, combine) in _STACKED.items():
        if parameter.endswith(suffix):
            return ParamRule((parameter.removesuffix(suffix) + name,), combine)
    return None


FAMILY = Family(
    "gpt_oss",
    ("GptOssForCausalLM",),
    GptOssConfig,
    build,
    {"self_attn.qkv_proj": FUSED["self_attn.qkv_proj"], "mlp.gate": ("mlp.router",)},
    _special,
)
