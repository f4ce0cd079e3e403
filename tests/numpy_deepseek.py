"""DeepSeek V2 and V3 in plain NumPy: a second opinion on latent attention and grouped experts.

Knows Hugging Face configurations and tensor names. Shares no code with mlc_llm, keeps keys and
values of every head (no latent cache) and computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")


def forward(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x, epsilon = w["model.embed_tokens.weight"][np.asarray(token_ids)], config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = _rms(x, w[at + "input_layernorm.weight"], epsilon)
        x = x + _attention(config, w, at + "self_attn.", normed)
        normed = _rms(x, w[at + "post_attention_layernorm.weight"], epsilon)
        is_sparse = layer >= config["first_k_dense_replace"]
        x = x + (experts if is_sparse else _dense)(config, w, at + "mlp.", normed)
    return _rms(x, w["model.norm.weight"], epsilon) @ w["lm_head.weight"].T


def _attention(config: Mapping[str, Any], w: Mapping[str, Array], at: str, x: Array) -> Array:
    n, heads, epsilon = len(x), config["num_attention_heads"], config["rms_norm_eps"]
    nope, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank = config["kv_lora_rank"]
    if config["q_lora_rank"]:
        q = _rms(x @ w[at + "q_a_proj.weight"].T, w[at + "q_a_layernorm.weight"], epsilon)
        q = q @ w[at + "q_b_proj.weight"].T
    else:
        q = x @ w[at + "q_proj.weight"].T
    q = q.reshape(n, heads, nope + turned).swapaxes(0, 1)
    compressed = x @ w[at + "kv_a_proj_with_mqa.weight"].T
    latent = _rms(compressed[:, :rank], w[at + "kv_a_layernorm.weight"], epsilon)
    kv = (latent @ w[at + "kv_b_proj.weight"].T).reshape(n, heads, -1).swapaxes(0, 1)
    frequencies, magnitude, sharpness = rotary(config["rope_parameters"], turned)
    rotation = magnitude * np.exp(1j * np.outer(np.arange(n), frequencies))
    q = np.concatenate([q[..., :nope], _rotate(q[..., nope:], rotation)], axis=-1)
    shared = np.broadcast_to(_rotate(compressed[:, rank:], rotation), (heads, n, turned))
    k = np.concatenate([kv[..., :nope], shared], axis=-1)
    scores = q @ k.swapaxes(1, 2) * sharpness / math.sqrt(nope + turned)
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = (weight / weight.sum(axis=-1, keepdims=True)) @ kv[..., nope:]
    joined: Array = out.swapaxes(0, 1).reshape(n, -1) @ w[at + "o_proj.weight"].T
    return joined


def rotary(rope: Mapping[str, Any], dim: int) -> tuple[Array, float, float]:
    """Return frequencies, the factor of sines and cosines, and that of scores."""
    base = rope["rope_theta"]
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    if rope["rope_type"] == "default":
        return frequencies, 1.0, 1.0
    assert rope["rope_type"] == "yarn", rope
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]

    def place(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(place(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(place(rope.get("beta_slow") or 1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    scaled = frequencies / factor * ramp + frequencies * (1 - ramp)
    whole = magnitude(rope.get("mscale_all_dim", 0))
    return scaled, magnitude(rope.get("mscale", 1)) / whole, whole**2


def _rotate(x: Array, rotation: NDArray[np.complex128]) -> Array:
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * rotation
    out: Array = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    return out


def experts(config: Mapping[str, Any], w: Mapping[str, Array], at: str, x: Array) -> Array:
    logits = x @ w[at + "gate.weight"].T
    groups, top_groups = config["n_group"], config["topk_group"]
    is_v3 = config["model_type"] in ("deepseek_v3", "glm4_moe", "dots1")
    if is_v3:
        scores = 1 / (1 + np.exp(-logits))
        wanted = scores + w[at + "gate.e_score_correction_bias"]
    else:
        power = np.exp(logits - logits.max(axis=-1, keepdims=True))
        wanted = scores = power / power.sum(axis=-1, keepdims=True)
    mixed = _dense(config, w, at + "shared_experts.", x)
    for token in range(len(x)):
        candidates = wanted[token].reshape(groups, -1)
        worth = np.sort(candidates, axis=1)[:, -2:].sum(axis=1) if is_v3 else candidates.max(axis=1)
        if is_v3 or config["topk_method"] == "group_limited_greedy":
            kept = np.isin(np.arange(groups), np.argsort(-worth)[:top_groups])
            candidates = np.where(kept[:, None], candidates, -np.inf)
        chosen = np.argsort(-candidates.ravel())[: config["num_experts_per_tok"]]
        share = scores[token, chosen]
        if config["norm_topk_prob"]:
            share = share / share.sum()
        for expert, weight in zip(chosen, share * config["routed_scaling_factor"], strict=True):
            out = _dense(config, w, f"{at}experts.{expert}.", x[token : token + 1])
            mixed[token] += weight * out[0]
    return mixed


def _dense(config: Mapping[str, Any], w: Mapping[str, Array], at: str, x: Array) -> Array:
    del config
    gate = x @ w[at + "gate_proj.weight"].T
    up = x @ w[at + "up_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * up @ w[at + "down_proj.weight"].T


def _rms(x: Array, weight: Array, epsilon: float) -> Array:
    out: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight
    return out
