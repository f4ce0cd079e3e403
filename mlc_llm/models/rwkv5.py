"""RWKV-5 (Eagle): token shifts and a linear attention with a state, no positions, no KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm.relax.frontend import nn

from mlc_llm.artifact import KVCacheLayout, TensorSpec
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.models.base import CausalLM, Family
from mlc_llm.models.config import DEFAULT_CONTEXT, DEFAULT_PREFILL_CHUNK, DecoderConfig, take_int
from mlc_llm.models.plan import ParamRule
from mlc_llm.nn import ops, recurrent_ops, row_ops
from mlc_llm.nn.kv import PagedKV
from mlc_llm.nn.linear import Embedding, Linear
from mlc_llm.nn.norm import LayerNorm
from mlc_llm.nn.ops import Rows
from mlc_llm.nn.rope import RopeConfig

# The checkpoint's weights that are halved every `rescale_every` layers, with the hidden states.
_RESCALED = ("attention.output.weight", "feed_forward.value.weight")


@dataclass(frozen=True)
class RwkvConfig(DecoderConfig):
    """Heads follow from `head_size`. There is no limit of the context but the one that is set.

    VERSION: what `model_version` must be. head_size_divisor: heads are divided by it before their
    norm. rescale_every: hidden states are halved after so many layers, 0 for never. is_rescaled:
    whether the checkpoint has weights for that already, as GGUF files have.
    """

    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {"rms_norm_eps": ("layer_norm_epsilon",)}
    VERSION: ClassVar[str] = "5_2"

    head_size: int = 64
    head_size_divisor: int = 8
    rescale_every: int = 0
    is_rescaled: bool = False
    model_version: str = "5_2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.head_size:
            raise CorruptFile(
                f"model configuration: hidden_size {self.hidden_size} is no multiple of head_size "
                f"{self.head_size}"
            )
        if self.model_version != self.VERSION:
            raise UnsupportedModel(
                f"RWKV of version {self.model_version!r:.40} is not supported here; use a "
                f"checkpoint of version {self.VERSION}"
            )
        if self.tie_word_embeddings:
            raise UnsupportedModel("RWKV with tied embeddings is not supported")

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Return no rotary embeddings."""
        return ()

    @classmethod
    def huggingface_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return constructor arguments from `config.json`."""
        if config.get("model_type") == "rwkv":
            raise UnsupportedModel("RWKV-4 is not supported; use a checkpoint of RWKV-5 or RWKV-6")
        hidden_size = take_int(config, "hidden_size")
        if config.get("attention_hidden_size") not in (None, hidden_size):
            raise UnsupportedModel(
                f"attention_hidden_size {config['attention_hidden_size']!r:.40} is not hidden_size "
                f"{hidden_size}, which is not supported"
            )
        return {
            **cls._completed(config),
            "hidden_size": hidden_size,
            "num_hidden_layers": take_int(config, "num_hidden_layers"),
            "vocab_size": take_int(config, "vocab_size"),
            "context_window_size": DEFAULT_CONTEXT,
            "prefill_chunk_size": DEFAULT_PREFILL_CHUNK,
            "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-5),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "rescale_every": int(config.get("rescale_every") or 0),
            "is_rescaled": bool(config.get("is_rescaled", False)),
            "model_version": str(config.get("model_version") or cls.VERSION),
            "position_embedding_base": 10000.0,
        }

    @classmethod
    def from_json(cls, model_config: Mapping[str, Any]) -> RwkvConfig:
        """Build from an artifact's `model_config`, ours or MLC LLM's. Raises CorruptFile."""
        return super().from_json({**model_config, **cls._completed(model_config)})

    @classmethod
    def _completed(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what follows from other fields where it is not given."""
        hidden_size = take_int(config, "hidden_size")
        head_size = config.get("head_size") or 64
        heads = hidden_size // take_int({"head_size": head_size}, "head_size")
        return {
            "intermediate_size": config.get("intermediate_size") or hidden_size * 7 // 2 // 32 * 32,
            "head_size": head_size,
            "head_size_divisor": config.get("head_size_divisor") or 8,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": head_size,
        }


class GatedGroupNorm(nn.Module):
    """A norm of each head, then silu of a gate."""

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        # Dividing heads before their norm is the same as a larger epsilon.
        self.eps = 1e-5 * config.head_size_divisor**2
        self.weight = nn.Parameter((config.hidden_size,), "float32")
        self.bias = nn.Parameter((config.hidden_size,), "float32")

    def forward(self, x: nn.Tensor, gate: nn.Tensor) -> nn.Tensor:
        """Return (n, hidden) float32."""
        args = (self.weight, self.bias, self.num_heads, self.eps)
        return recurrent_ops.gated_group_norm(x, gate, *args)


class Attention(nn.Module):
    """Linear attention with decays that are the same for all tokens (Peng et al. 2024, Eagle)."""

    def __init__(self, config: RwkvConfig, dtype: str, layer: int) -> None:
        super().__init__()
        del layer
        width = config.hidden_size
        for part in ("key", "value", "receptance", "gate"):
            setattr(self, f"time_mix_{part}", nn.Parameter((1, 1, width), dtype))
        heads = (config.num_attention_heads, config.head_size)
        self.time_decay = nn.Parameter(heads, "float32")
        self.time_faaaa = nn.Parameter(heads, "float32")
        for part in ("receptance", "key", "value", "gate", "output"):
            setattr(self, part, Linear(width, width, dtype))
        self.ln_x = GatedGroupNorm(config)

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        before = recurrent_ops.token_shift(x, kv, f"attention_shift.{layer}")
        k, v, r, gate = (
            getattr(self, part)(recurrent_ops.lerp(before, x, getattr(self, f"time_mix_{part}")))
            for part in ("key", "value", "receptance", "gate")
        )
        decay = recurrent_ops.static_decay(self.time_decay)
        args = (r, k, v, decay, self.time_faaaa, kv, f"wkv.{layer}")
        out = recurrent_ops.wkv(*args, is_dynamic=False)
        return self.output(self.ln_x(out, gate))


class FeedForward(nn.Module):
    """sigmoid(receptance) * value(relu(key)**2), both of rows mixed with the token before.

    mixes: names of the parameters that mix rows for the key and for the receptance.
    """

    def __init__(self, config: RwkvConfig, dtype: str, mixes: tuple[str, str]) -> None:
        super().__init__()
        hidden_size, width = config.hidden_size, config.intermediate_size
        self.mixes = mixes
        for name in mixes:
            setattr(self, name, nn.Parameter((1, 1, hidden_size), dtype))
        self.key = Linear(hidden_size, width, dtype)
        self.receptance = Linear(hidden_size, hidden_size, dtype)
        self.value = Linear(width, hidden_size, dtype)

    def mixed(self, x: nn.Tensor, before: nn.Tensor, name: str) -> nn.Tensor:
        """Return rows mixed with those before them: all x where the parameter is 1."""
        return recurrent_ops.lerp(before, x, getattr(self, name))

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        before = recurrent_ops.token_shift(x, kv, f"feed_forward_shift.{layer}")
        key, receptance = (self.mixed(x, before, name) for name in self.mixes)
        value = self.value(row_ops.activate(self.key(key), "relu2"))
        return recurrent_ops.sigmoid_mul(value, self.receptance(receptance))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the first one begins with a norm."""

    def __init__(
        self,
        config: RwkvConfig,
        dtype: str,
        layer: int,
        attention: nn.Module,
        feed_forward: nn.Module,
    ) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_ln = LayerNorm(hidden_size, eps, dtype) if layer == 0 else None
        self.ln1 = LayerNorm(hidden_size, eps, dtype)
        self.ln2 = LayerNorm(hidden_size, eps, dtype)
        self.attention, self.feed_forward = attention, feed_forward
        is_end = config.rescale_every > 0 and (layer + 1) % config.rescale_every == 0
        self.factor = 0.5 if is_end else 1.0

    def forward(self, x: nn.Tensor, kv: PagedKV, layer: int) -> nn.Tensor:
        """Return (n, hidden) float32."""
        if self.pre_ln is not None:
            x = self.pre_ln(x)
        x = ops.add(x, self.attention(self.ln1(x), kv, layer))
        x = ops.add(x, self.feed_forward(self.ln2(x), kv, layer))
        return row_ops.scale(x, self.factor)


class RwkvModel(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: RwkvConfig, dtype: str, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.blocks = nn.ModuleList(list(blocks))
        self.ln_out = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype)


class RwkvLM(CausalLM):
    """RWKV with its output layer; all it keeps of earlier tokens is a state."""

    config: RwkvConfig

    def __init__(self, config: RwkvConfig, dtype: str, blocks: Sequence[Block]) -> None:
        super().__init__(config, dtype)
        self.model = RwkvModel(config, dtype, blocks)
        self.head = Linear(config.hidden_size, config.vocab_size, dtype)

    def kv_layout(self) -> KVCacheLayout:
        """Return a layout without layers."""
        return dataclasses.replace(super().kv_layout(), num_layers=0)

    def state_specs(self) -> list[TensorSpec]:
        """Return the last row before each token shift, and the matrices of linear attention."""
        config = self.config
        row = (config.hidden_size,)
        heads = (config.num_attention_heads, config.head_size, config.head_size)
        return [
            TensorSpec(f"{name}.{layer}", shape, "float32")
            for layer in range(config.num_hidden_layers)
            for name, shape in (
                ("attention_shift", row),
                ("wkv", heads),
                ("feed_forward_shift", row),
            )
        ]

    def hidden_states(self, token_ids: nn.Tensor, kv: PagedKV) -> nn.Tensor:
        """Embed the tokens (n) of a step and run all blocks: (n, hidden) float32."""
        hidden = self.model.embeddings(token_ids)
        for layer, block in enumerate(self.model.blocks):
            hidden = block(hidden, kv, layer)
        return hidden

    def final_norm(self, hidden: nn.Tensor) -> nn.Tensor | Rows:
        """Normalise rows (r, hidden) for the output layer."""
        return self.model.ln_out(hidden)

    def logits(self, rows: nn.Tensor | Rows) -> nn.Tensor:
        """Return (r, vocab) float32 for rows after the final norm."""
        return self.head(rows)


def build(config: RwkvConfig, dtype: str) -> CausalLM:
    """Build the unquantized module with parameters of `dtype`."""
    mixes = ("time_mix_key", "time_mix_receptance")
    blocks = [
        Block(config, dtype, i, Attention(config, dtype, i), FeedForward(config, dtype, mixes))
        for i in range(config.num_hidden_layers)
    ]
    return RwkvLM(config, dtype, blocks)


def rule_for(config: RwkvConfig, parameter: str) -> ParamRule:
    """Return the rule of a parameter: Hugging Face calls `model` `rwkv`, and rescales later."""
    source = parameter.replace("model.", "rwkv.", 1)
    if config.is_rescaled or config.rescale_every == 0 or not parameter.endswith(_RESCALED):
        return ParamRule((source,))
    layer = int(parameter.split(".")[2])
    divisor = np.float32(2 ** (layer // config.rescale_every))

    def rescale(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return (parts[0].astype(np.float32) / divisor).astype(parts[0].dtype)

    return ParamRule((source,), rescale)


# The first checkpoints of RWKV-5 called themselves by the name of RWKV-4.
_NAMES = ("Rwkv5ForCausalLM", "RwkvForCausalLM")
FAMILY = Family("rwkv5", _NAMES, RwkvConfig, build, special=rule_for)
