"""Parameter names and layouts that MLC LLM gives RWKV-5, RWKV-6 and Qwen3.5.

Part of the independent packer: shares no code with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from mlc_names_later import stacked_experts
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

MODEL_TYPES = ("rwkv5", "rwkv6", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
# Norms of Qwen3.5 that are stored with 1 added; the gated one of linear attention is not.
_PLUS_ONE = ("layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight")


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under MLC names."""
    yield from (
        _qwen(config, weights)
        if config["model_type"].startswith("qwen")
        else _rwkv(config, weights)
    )


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of MLC LLM's class of the family, without the limits all have."""
    names = ["vocab_size", "hidden_size", "num_hidden_layers"]
    names += ["intermediate_size"] if "intermediate_size" in config else []
    if config["model_type"].startswith("qwen"):
        names += ["num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"]
        names += ["layer_types"] if "layer_types" in config else []
        names += ["linear_conv_kernel_dim", "tie_word_embeddings", "hidden_act"]
        names += [f"linear_{kind}_head_dim" for kind in ("key", "value")]
        names += [f"linear_num_{kind}_heads" for kind in ("key", "value")]
        rope = config.get("rope_parameters", config)
        fields = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
        return {**{name: config[name] for name in names}, **fields}
    names += ["head_size", "layer_norm_epsilon", "rescale_every"]
    version = "5_2" if config["model_type"] == "rwkv5" else "6_0"
    heads = config["hidden_size"] // config["head_size"]
    fields = {name: config[name] for name in names}
    return {**fields, "model_version": version, "num_heads": heads}


def _rwkv(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    for name, weight in weights.items():
        if config["rescale_every"] and name.endswith(
            ("attention.output.weight", "feed_forward.value.weight")
        ):
            layer = int(name.split(".")[2])
            weight = weight / np.float32(2 ** (layer // config["rescale_every"]))
        yield name.replace("rwkv.", "model."), weight


def _qwen(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    for name, weight in weights.items():
        if ".experts." in name:
            yield from stacked_experts(name, weights)
        elif ".in_proj_qkvz." in name or ".in_proj_ba." in name:
            yield from _by_kind(config, name, weight)
        elif ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            yield name.replace("q_proj", "c_attn"), np.concatenate(parts)
        elif ".gate_proj." in name:
            parts = [weight, weights[name.replace(".gate_proj.", ".up_proj.")]]
            yield name.replace("gate_proj", "gate_up_proj"), np.concatenate(parts)
        elif name.endswith(_PLUS_ONE) or name == "model.norm.weight":
            yield name, weight + 1
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            yield name.replace("conv1d.weight", "conv1d_weight"), weight


def _by_kind(config: Mapping[str, Any], name: str, weight: Array) -> Iterator[tuple[str, Array]]:
    """Yield inputs of linear attention kind by kind: Qwen3-Next's lie key head by key head."""
    heads, columns = config["linear_num_key_heads"], weight.shape[1]
    rows = weight.reshape(heads, -1, columns)
    if ".in_proj_ba." in name:
        for kind, part in zip("ba", np.split(rows, 2, axis=1), strict=True):
            yield name.replace("in_proj_ba", f"in_proj_{kind}"), part.reshape(-1, columns)
        return
    size = config["linear_key_head_dim"]
    half = (rows.shape[1] - 2 * size) // 2
    *parts, z = np.split(rows, [size, 2 * size, 2 * size + half], axis=1)
    qkv = np.concatenate([part.reshape(-1, columns) for part in parts])
    yield name.replace("qkvz", "qkv"), qkv
    yield name.replace("qkvz", "z"), z.reshape(-1, columns)
