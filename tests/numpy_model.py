"""Llama, Mistral, Mixtral, DeepSeek 1 and Qwen2 and 3, with experts and without, in plain NumPy:
the second opinion that tests compare against.

Knows Hugging Face configurations and tensor names. Shares no code with mlc_llm, keeps no KV cache
and computes in float64, so a difference is never its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]

_MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# safetensors.numpy refuses bfloat16, so bytes are turned into arrays here.
_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize


def read_weights(directory: Path) -> dict[str, NDArray[Any]]:
    """Return every tensor of a Hugging Face directory, single file or sharded."""
    weights: dict[str, NDArray[Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in _deserialize(path.read_bytes()):
            array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
            weights[name] = array.reshape(tensor["shape"])
    return weights


def forward(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    is_tied = config.get("tie_word_embeddings")
    head = weights["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
    return hidden_states(config, weights, token_ids) @ head.astype(np.float64).T


def hidden_states(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return (n, hidden) after the final norm."""
    epsilon = config["rms_norm_eps"]
    hidden = weights["model.embed_tokens.weight"].astype(np.float64)[np.asarray(token_ids)]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, weights[prefix + "input_layernorm.weight"], epsilon)
        hidden = hidden + _attention(config, weights, prefix + "self_attn.", normed)
        normed = _rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], epsilon)
        hidden = hidden + _feed_forward(config, weights, prefix, normed)
    return _rms_norm(hidden, weights["model.norm.weight"], epsilon)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters in transformers 5 style, from either style of config.json."""
    found = config.get("rope_parameters")
    if found is None:
        found = {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def window_size(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens, itself included, a token attends to; None means all."""
    window: int | None = config.get("sliding_window")
    return window if config.get("use_sliding_window", True) else None


def head_size(config: Mapping[str, Any]) -> int:
    """Return the size of one attention head."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(size)


def _attention(config: Mapping[str, Any], weights: Weights, prefix: str, hidden: Array) -> Array:
    n, size = len(hidden), head_size(config)
    rotation = np.exp(1j * np.outer(np.arange(n), _frequencies(rope_parameters(config), size)))
    q, k, v = (
        _linear(weights, f"{prefix}{part}_proj", hidden).reshape(n, -1, size).swapaxes(0, 1)
        for part in "qkv"
    )  # (n, h*d) -> (h, n, d)
    if prefix + "q_norm.weight" in weights:
        q = _rms_norm(q, weights[prefix + "q_norm.weight"], config["rms_norm_eps"])
        k = _rms_norm(k, weights[prefix + "k_norm.weight"], config["rms_norm_eps"])
    q, k = _rotate(q, rotation), _rotate(k, rotation)
    group = len(q) // len(k)
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    visible = (distance >= 0) & (distance < (window_size(config) or n))
    scores = np.where(visible, q @ k.swapaxes(1, 2) / math.sqrt(size), -np.inf)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    output = (weight / weight.sum(axis=-1, keepdims=True)) @ v
    return _linear(weights, prefix + "o_proj", output.swapaxes(0, 1).reshape(n, -1))


def _frequencies(rope: Mapping[str, Any], size: int) -> Array:
    frequencies = rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
    if rope["rope_type"] == "linear":
        return np.asarray(frequencies / rope["factor"])
    if rope["rope_type"] == "llama3":
        # Slow rotations are stretched by the factor, fast ones kept, those between interpolated.
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return np.asarray(frequencies * (kept + (1 - kept) / rope["factor"]))
    assert rope["rope_type"] == "default", rope
    return np.asarray(frequencies)


def _rotate(x: Array, rotation: NDArray[np.complex128]) -> Array:
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * rotation
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _feed_forward(config: Mapping[str, Any], weights: Weights, prefix: str, hidden: Array) -> Array:
    if f"{prefix}block_sparse_moe.gate.weight" in weights:
        block, names, renormalize = prefix + "block_sparse_moe.", ("w1", "w3", "w2"), True
    elif f"{prefix}mlp.gate.weight" in weights:
        block, names, renormalize = prefix + "mlp.", _MLP_NAMES, config["norm_topk_prob"]
    else:
        return _mlp(weights, prefix + "mlp.", hidden)
    logits = hidden @ weights[block + "gate.weight"].astype(np.float64).T
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    # All but the best count as nothing.
    scores[scores < np.sort(scores, axis=1)[:, [-config["num_experts_per_tok"]]]] = 0
    if renormalize:
        scores /= scores.sum(axis=1, keepdims=True)
    output = np.zeros_like(hidden)
    for expert in np.flatnonzero(scores.any(axis=0)):
        [rows] = np.nonzero(scores[:, expert])
        result = _mlp(weights, f"{block}experts.{expert}.", hidden[rows], names)
        output[rows] += scores[rows, expert, None] * result
    if f"{block}shared_experts.gate_proj.weight" in weights:  # DeepSeek
        output += _mlp(weights, block + "shared_experts.", hidden)
    if f"{block}shared_expert_gate.weight" in weights:
        share = hidden @ weights[block + "shared_expert_gate.weight"].astype(np.float64).T
        output += _mlp(weights, block + "shared_expert.", hidden) / (1 + np.exp(-share))
    return output


def _mlp(
    weights: Weights, prefix: str, hidden: Array, names: tuple[str, str, str] = _MLP_NAMES
) -> Array:
    gate, up = (_linear(weights, prefix + name, hidden) for name in names[:2])
    return _linear(weights, prefix + names[2], gate / (1 + np.exp(-gate)) * up)


def _linear(weights: Weights, name: str, hidden: Array) -> Array:
    output: Array = hidden @ weights[name + ".weight"].astype(np.float64).T
    bias = weights.get(name + ".bias")
    return output if bias is None else output + bias.astype(np.float64)


def _rms_norm(hidden: Array, weight: NDArray[Any], epsilon: float) -> Array:
    scale: Array = np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + epsilon)
    return hidden / scale * weight.astype(np.float64)
