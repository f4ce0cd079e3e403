"""Tensors of dense families under Llama's names, for the second opinion on their arithmetic.

Knows what published checkpoints call tensors and which of them they keep as one. Shares no code
with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Config = Mapping[str, Any]


def split_rows(weights: dict[str, Array], name: str, parts: Mapping[str, int]) -> None:
    """Replace the tensors of a module by those of its parts; parts: name -> rows."""
    for leaf in (".weight", ".bias"):
        if name + leaf in weights:
            pieces = np.split(weights.pop(name + leaf), np.cumsum(list(parts.values()))[:-1])
            weights.update(zip((part + leaf for part in parts), pieces, strict=True))


def _rename(weights: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    renamed = {}
    for name, weight in weights.items():
        for theirs, llamas in names.items():
            name = name.replace(theirs, llamas)
        renamed[name] = weight
    return renamed


def _split_fused(qkv: str, gate_up: str | None = None) -> Callable[[Config, Any], dict[str, Array]]:
    """Take q, k and v, and gate and up, apart; qkv, gate_up: what their modules are called."""

    def rename(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
        weights = dict(weights)
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        size = config.get("head_dim") or config["hidden_size"] // heads
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            rows = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
            parts = {f"{at}self_attn.{part}_proj": count for part, count in rows.items()}
            split_rows(weights, f"{at}self_attn.{qkv}", parts)
            if gate_up is not None:
                width = config["intermediate_size"]
                halves = {f"{at}mlp.gate_proj": width, f"{at}mlp.up_proj": width}
                split_rows(weights, f"{at}mlp.{gate_up}", halves)
        return weights

    return rename


def _internlm2_names(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    weights = _rename(
        weights,
        {
            "tok_embeddings": "embed_tokens",
            "output.": "lm_head.",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
        },
    )
    kv_heads = config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        joined = weights.pop(at + "attention.wqkv.weight")
        heads = joined.reshape(kv_heads, group + 2, -1, joined.shape[1])
        for part, rows in {"q": heads[:, :group], "k": heads[:, -2], "v": heads[:, -1]}.items():
            weights[f"{at}self_attn.{part}_proj.weight"] = rows.reshape(-1, joined.shape[1])
    return weights


def _chatglm_names(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    weights = _rename(
        weights,
        {
            "transformer.embedding.word_embeddings": "model.embed_tokens",
            "transformer.encoder.final_layernorm": "model.norm",
            "transformer.output_layer": "lm_head",
            "transformer.encoder.layers": "model.layers",
            "self_attention.dense": "self_attn.o_proj",
            "self_attention.": "self_attn.",
            "dense_4h_to_h": "down_proj",
        },
    )
    fields = {
        **config,
        "num_hidden_layers": config["num_layers"],
        "num_key_value_heads": config["multi_query_group_num"],
        "head_dim": config["kv_channels"],
        "intermediate_size": config["ffn_hidden_size"],
    }
    return _split_fused("query_key_value", "dense_h_to_4h")(fields, weights)


def _starcoder2_names(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    return _rename(weights, {"c_fc": "up_proj", "c_proj": "down_proj"})


def _qwen_names(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    weights = _rename(
        weights,
        {
            "transformer.wte": "model.embed_tokens",
            "transformer.ln_f": "model.norm",
            "transformer.h": "model.layers",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "attn.c_attn": "self_attn.c_attn",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
    )
    return _split_fused("c_attn")({**config, "head_dim": config["kv_channels"]}, weights)


RENAMED: dict[str, Callable[[Config, dict[str, Array]], dict[str, Array]]] = {
    "phi3": _split_fused("qkv_proj", "gate_up_proj"),
    "baichuan": _split_fused("W_pack"),
    "internlm2": _internlm2_names,
    "chatglm": _chatglm_names,
    "starcoder2": _starcoder2_names,
    "qwen": _qwen_names,
}
