"""Phi-1, Phi-1.5 and Phi-2, as transformers stores them and as Microsoft first did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.relax.frontend import nn

from mlc_llm.errors import UnsupportedModel
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DecoderConfig
from mlc_llm.models.fused_attention import FusedAttention
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.mlp import MLP
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows


@dataclass(frozen=True)
class PhiConfig(DecoderConfig):
    """A decoder that rotates a share of each head."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"rms_norm_eps": ("layer_norm_eps",)}

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        if config.get("qk_layernorm"):
            raise UnsupportedModel("configuration: qk_layernorm=True is not supported")
        share = {"partial_rotary_factor": 0.5}
        named = {**share, **{k: v for k, v in config.items() if v is not None}}
        return {
            **super().huggingface_fields(named),
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-5),
            "hidden_act": config.get("hidden_act") or "gelu_new",
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> PhiConfig:
        """Build from an artifact's `model_config`; MLC LLM's names no activation."""
        return super().from_json(
            {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, **model_config}
        )


@dataclass(frozen=True)
class MixFormerConfig(PhiConfig):
    """The same under the names of Microsoft's first release."""

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "num_key_value_heads": ("n_head_kv",),
        "intermediate_size": ("n_inner",),
        "rms_norm_eps": ("layer_norm_epsilon",),
        "hidden_act": ("activation_function",),
    }

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        named = {**config, "max_position_embeddings": config.get("n_positions")}
        return super().huggingface_fields(cls._derive(named))

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> MixFormerConfig:
        """Build from an artifact's `model_config`."""
        config = super().from_json(cls._derive(cls._with_own_names(model_config)))
        assert isinstance(config, cls)
        return config

    @classmethod
    def _derive(cls, config: dict[str, Any]) -> dict[str, Any]:
        hidden_size, heads = config.get("hidden_size") or 0, config.get("num_attention_heads") or 1
        if (config.get("intermediate_size") or -1) < 1:
            config["intermediate_size"] = 4 * hidden_size
        if config.get("partial_rotary_factor") is None and config.get("rotary_dim"):
            config["partial_rotary_factor"] = config["rotary_dim"] * heads / (hidden_size or 1)
        return config

    def to_json(self) -> dict[str, Any]:
        """Return `model_config` as an artifact stores it."""
        return {**super().to_json(), "rotary_dim": self.rotary_dim}

    @property
    def rotary_dim(self) -> int:
        """Return how many dimensions of a head are rotated."""
        return round(self.head_dim * self.partial_rotary_factor)


class PhiLayer(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both."""

    def __init__(self, config: PhiConfig, dtype: str, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.ln = LayerNorm(size, config.rms_norm_eps, dtype)
        self.mixer = FusedAttention(config, dtype, layer, ("Wqkv", "out_proj"))
        names = ("fc1", "fc2")
        self.mlp = MLP(size, config.intermediate_size, dtype, config.hidden_act, names)

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        normed = self.ln(x)
        return ops.add(ops.add(x, self.mixer(normed, kv, layer)), self.mlp(normed))


class PhiModel(nn.Module):
    """Embedding and layers."""

    def __init__(self, config: PhiConfig, dtype: str) -> None:
        super().__init__()
        self.embd = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.h = nn.ModuleList(
            [PhiLayer(config, dtype, layer) for layer in range(config.num_hidden_layers)]
        )


class PhiHead(nn.Module):
    """Final norm and output layer."""

    def __init__(self, config: PhiConfig, dtype: str) -> None:
        super().__init__()
        self.ln = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.linear = Linear(config.hidden_size, config.vocab_size, dtype, bias=True)


class Phi(CausalLM):
    """Phi with its output layer, which has a bias."""

    def __init__(self, config: PhiConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self.transformer = PhiModel(config, dtype)
        self.lm_head = PhiHead(config, dtype)

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all layers: (n, hidden) float32."""
        x = self.transformer.embd(token_ids)
        for index, layer in enumerate(self.transformer.h):
            x = layer(x, kv, index)
        return x

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.lm_head.ln(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.lm_head.linear(rows)


# Path of a module here -> in checkpoints of transformers, in order of first match.
_NAMES = (
    ("transformer.embd", "model.embed_tokens"),
    ("transformer.h.", "model.layers."),
    (".mixer.out_proj", ".self_attn.dense"),
    ("lm_head.ln", "model.final_layernorm"),
    ("lm_head.linear", "lm_head"),
)


def _transformers_name(config: PhiConfig, parameter: str) -> ParamRule:
    del config
    path, _, leaf = parameter.rpartition(".")
    for ours, theirs in _NAMES:
        path = path.replace(ours, theirs)
    if path.endswith(".ln"):
        path = path.removesuffix("ln") + "input_layernorm"
    if path.endswith(".mixer.Wqkv"):
        prefix = path.removesuffix("mixer.Wqkv") + "self_attn."
        return ParamRule(tuple(f"{prefix}{part}_proj.{leaf}" for part in "qkv"))
    return ParamRule((f"{path}.{leaf}",))


def _first_name(config: PhiConfig, parameter: str) -> ParamRule | None:
    del config
    is_table = parameter == "transformer.embd.weight"
    return ParamRule(("transformer.embd.wte.weight",)) if is_table else None


FAMILY = Family("phi", ("PhiForCausalLM",), PhiConfig, Phi, special=_transformers_name)
# Its later checkpoints name the class as those of transformers do; `model_type` tells them apart.
MIXFORMER = Family(
    "phi-msft",
    ("MixFormerSequentialForCausalLM", "PhiForCausalLM"),
    MixFormerConfig,
    Phi,
    special=_first_name,
)
