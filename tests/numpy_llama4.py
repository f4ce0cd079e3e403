"""Llama 4's text part in plain NumPy: a second opinion on chunks, layers without positions, and
experts that get a share of their input.

Knows Hugging Face configurations and tensor names. Shares no code with mlc_llm, keeps no KV cache
and computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]

MODEL_TYPES = ("llama4", "llama4_text")


def forward(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    config = config.get("text_config", config)
    w = {k.removeprefix("language_model."): v.astype(np.float64) for k, v in weights.items()}
    x, epsilon = w["model.embed_tokens.weight"][np.asarray(token_ids)], config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = x + _attention(config, w, layer, _rms(x, epsilon) * w[at + "input_layernorm.weight"])
        normed = _rms(x, epsilon) * w[at + "post_attention_layernorm.weight"]
        is_sparse = layer in config["moe_layers"]
        x = x + (_experts if is_sparse else _dense)(config, w, at + "feed_forward.", normed)
    return _rms(x, epsilon) * w["model.norm.weight"] @ w["lm_head.weight"].T


def _attention(config: Mapping[str, Any], w: Mapping[str, Array], layer: int, x: Array) -> Array:
    n, size, at = len(x), config["head_dim"], f"model.layers.{layer}.self_attn."
    q, k, v = (
        (x @ w[f"{at}{part}_proj.weight"].T).reshape(n, -1, size).swapaxes(0, 1) for part in "qkv"
    )
    place = np.arange(n)
    if config["no_rope_layers"][layer]:
        turn = np.exp(1j * np.outer(place, _frequencies(config["rope_parameters"], size)))
        q, k = _rotate(q, turn), _rotate(k, turn)
        if config["use_qk_norm"]:
            q, k = _rms(q, config["rms_norm_eps"]), _rms(k, config["rms_norm_eps"])
    elif config["attn_temperature_tuning"]:
        steps = np.floor((place + 1) / config["floor_scale"])
        q = q * (1 + config["attn_scale"] * np.log(1 + steps))[:, None]
    k, v = (np.repeat(part, len(q) // len(k), axis=0) for part in (k, v))
    sees = place[None, :] <= place[:, None]
    if config["layer_types"][layer] == "chunked_attention":
        chunk = place // config["attention_chunk_size"]
        sees &= chunk[None, :] == chunk[:, None]
    scores = np.where(sees, q @ k.swapaxes(1, 2) / math.sqrt(size), -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = (share / share.sum(axis=-1, keepdims=True)) @ v
    joined: Array = out.swapaxes(0, 1).reshape(n, -1) @ w[at + "o_proj.weight"].T
    return joined


def _frequencies(rope: Mapping[str, Any], size: int) -> Array:
    frequencies: Array = rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
    if rope["rope_type"] == "default":
        return frequencies
    # Published models have no ramp: what turns less than once is stretched.
    assert rope["low_freq_factor"] == rope["high_freq_factor"] == 1, rope
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    return np.where(turns < 1, frequencies / rope["factor"], frequencies)


def _rotate(x: Array, turn: NDArray[np.complex128]) -> Array:
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    out: Array = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    return out


def _experts(config: Mapping[str, Any], w: Mapping[str, Array], at: str, x: Array) -> Array:
    logits = x @ w[at + "router.weight"].T
    gate_up, down = w[at + "experts.gate_up_proj"], w[at + "experts.down_proj"]
    mixed = _dense(config, w, at + "shared_expert.", x)
    for token in range(len(x)):
        for expert in np.argsort(-logits[token])[: config["num_experts_per_tok"]]:
            part = x[token] / (1 + np.exp(-logits[token, expert]))
            gate, up = np.split(part @ gate_up[expert], 2)
            mixed[token] += gate / (1 + np.exp(-gate)) * up @ down[expert]
    return mixed


def _dense(config: Mapping[str, Any], w: Mapping[str, Array], at: str, x: Array) -> Array:
    del config
    gate = x @ w[at + "gate_proj.weight"].T
    up = x @ w[at + "up_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * up @ w[at + "down_proj.weight"].T


def _rms(x: Array, epsilon: float) -> Array:
    out: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
    return out
