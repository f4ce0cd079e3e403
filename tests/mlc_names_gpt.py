"""Parameter names and layouts that MLC LLM gives GPT-2, GPT-BigCode, GPT-NeoX, GPT-J and Phi.

Part of the independent packer: shares no code with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

MODEL_TYPES = ("gpt2", "gpt_bigcode", "gpt_neox", "gptj", "phi")
_PHI = {
    "ln": "input_layernorm",
    "mixer.out_proj": "self_attn.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under MLC names."""
    kind = config["model_type"]
    if kind in ("gpt2", "gpt_bigcode"):
        yield from _gpt2(config, weights)
    elif kind == "gpt_neox":
        yield from _gpt_neox(config, weights)
    elif kind == "gptj":
        yield from _gptj(weights)
    else:
        yield from _phi(config, weights)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of MLC LLM's class of the family, without the limits all have."""
    kind = config["model_type"]
    if kind in ("gpt2", "gpt_bigcode", "gptj"):
        names = ("vocab_size", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
        inner = config.get("n_inner") or 4 * config["n_embd"]
        fields = {**{name: config[name] for name in names}, "n_inner": inner}
        return {**fields, "rotary_dim": config["rotary_dim"]} if kind == "gptj" else fields
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields = {name: config[name] for name in (*names, "num_attention_heads", "layer_norm_eps")}
    rope = config["rope_parameters"]
    fields["position_embedding_base"] = rope["rope_theta"]
    if kind == "gpt_neox":
        fields["rotary_pct"] = rope["partial_rotary_factor"]
        fields["use_parallel_residual"] = config["use_parallel_residual"]
    else:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
        fields["num_key_value_heads"] = config["num_key_value_heads"]
    return fields


def _gpt2(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    is_bigcode = config["model_type"] == "gpt_bigcode"
    matrices = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    for name, weight in weights.items():
        if is_bigcode and ".c_attn." in name and not config["multi_query"]:
            yield name, _by_part(weight, config["n_head"])
        elif not is_bigcode and name.endswith(matrices):
            yield name, weight.T
        elif name != "lm_head.weight":
            yield name, weight
    yield "lm_head.weight", weights.get("lm_head.weight", weights["transformer.wte.weight"])


def _gpt_neox(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    for name, weight in weights.items():
        is_joined = ".query_key_value." in name
        yield name, _by_part(weight, config["num_attention_heads"]) if is_joined else weight


def _by_part(weight: Array, heads: int) -> Array:
    """Turn [q; k; v] of each head into all q, all k, all v."""
    size = len(weight) // (3 * heads)
    parts: list[Array] = [
        weight[(3 * head + part) * size : (3 * head + part + 1) * size]
        for part in range(3)
        for head in range(heads)
    ]
    return np.concatenate(parts)


def _gptj(weights: Weights) -> Iterator[tuple[str, Array]]:
    for name, weight in weights.items():
        if name.endswith(".q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield name.replace("q_proj", "c_attn"), np.concatenate(parts)
        elif not name.endswith((".k_proj.weight", ".v_proj.weight")):
            yield name, weight


def _phi(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    yield "transformer.embd.weight", weights["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for leaf in (".weight", ".bias"):
            parts = [weights[f"{theirs}self_attn.{part}_proj{leaf}"] for part in "qkv"]
            yield f"{ours}mixer.Wqkv{leaf}", np.concatenate(parts)
            for name, source in _PHI.items():
                yield ours + name + leaf, weights[theirs + source + leaf]
    for leaf in (".weight", ".bias"):
        yield "lm_head.ln" + leaf, weights["model.final_layernorm" + leaf]
        yield "lm_head.linear" + leaf, weights["lm_head" + leaf]
