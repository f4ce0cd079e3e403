"""gpt-oss in plain NumPy: a second opinion on sinks, windows in turn and bounded experts.

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

MODEL_TYPES = ("gpt_oss",)


def forward(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x, epsilon = w["model.embed_tokens.weight"][np.asarray(token_ids)], config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = _rms(x, w[at + "input_layernorm.weight"], epsilon)
        x = x + _attention(config, w, layer, normed)
        normed = _rms(x, w[at + "post_attention_layernorm.weight"], epsilon)
        x = x + _experts(config, w, at + "mlp.", normed)
    return _rms(x, w["model.norm.weight"], epsilon) @ w["lm_head.weight"].T


def _attention(config: Mapping[str, Any], w: Mapping[str, Array], layer: int, x: Array) -> Array:
    n, size, at = len(x), config["head_dim"], f"model.layers.{layer}.self_attn."
    q, k, v = (
        _linear(w, f"{at}{part}_proj", x).reshape(n, -1, size).swapaxes(0, 1) for part in "qkv"
    )
    frequencies, magnitude = _rope(config["rope_parameters"], size)
    turn = magnitude * np.exp(1j * np.outer(np.arange(n), frequencies))
    q, k = _rotate(q, turn), _rotate(k, turn)
    k, v = (np.repeat(part, len(q) // len(k), axis=0) for part in (k, v))
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    is_local = config["layer_types"][layer] == "sliding_attention"
    sees = (distance >= 0) & (distance < (config["sliding_window"] if is_local else n))
    power = np.exp(np.where(sees, q @ k.swapaxes(1, 2) / math.sqrt(size), -np.inf))
    total = power.sum(axis=-1, keepdims=True) + np.exp(w[at + "sinks"])[:, None, None]
    out = (power / total) @ v
    return _linear(w, at + "o_proj", out.swapaxes(0, 1).reshape(n, -1))


def _rope(rope: Mapping[str, Any], size: int) -> tuple[Array, float]:
    """Return YaRN's frequencies, and the factor of sines and cosines."""
    base, factor = rope["rope_theta"], rope["factor"]
    trained = rope["original_max_position_embeddings"]
    frequencies = base ** (-np.arange(0, size, 2) / size)

    def place(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(rope["beta_fast"]), place(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
    scaled = frequencies / factor * ramp + frequencies * (1 - ramp)
    return scaled, 0.1 * math.log(factor) + 1


def _rotate(x: Array, turn: NDArray[np.complex128]) -> Array:
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _experts(config: Mapping[str, Any], w: Mapping[str, Array], at: str, x: Array) -> Array:
    logits, limit = _linear(w, at + "router", x), config["swiglu_limit"]
    mixed = np.zeros_like(x)
    for token in range(len(x)):
        chosen = np.argsort(-logits[token])[: config["num_experts_per_tok"]]
        share = np.exp(logits[token, chosen])
        for expert, weight in zip(chosen, share / share.sum(), strict=True):
            both = x[token] @ w[at + "experts.gate_up_proj"][expert]
            both = both + w[at + "experts.gate_up_proj_bias"][expert]
            gate, up = np.minimum(both[0::2], limit), both[1::2].clip(-limit, limit)
            inner = (up + 1) * gate / (1 + np.exp(-config["swiglu_alpha"] * gate))
            out = inner @ w[at + "experts.down_proj"][expert]
            mixed[token] += weight * (out + w[at + "experts.down_proj_bias"][expert])
    return mixed


def _linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    out: Array = x @ w[name + ".weight"].T + w[name + ".bias"]
    return out


def _rms(x: Array, weight: Array, epsilon: float) -> Array:
    out: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight
    return out
