"""GPT-2, GPT-BigCode, GPT-NeoX, GPT-J and Phi in plain NumPy: a second opinion on their arithmetic.

Knows Hugging Face configurations and tensor names. Shares no code with mlc_llm and computes in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]


def forward(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return _FORWARDS[config["model_type"]](config, wide, np.asarray(token_ids))


def _gpt2(config: Mapping[str, Any], w: Mapping[str, Array], ids: NDArray[Any]) -> Array:
    heads, epsilon = config["n_head"], config["layer_norm_epsilon"]
    is_bigcode = config["model_type"] == "gpt_bigcode"
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."
        normed = _norm(x, w, at + "ln_1", epsilon)
        if is_bigcode:
            joined = _linear(normed, w, at + "attn.c_attn")
        else:
            joined = normed @ w[at + "attn.c_attn.weight"] + w[at + "attn.c_attn.bias"]
        size = x.shape[1] // heads
        if is_bigcode and config["multi_query"]:
            q, k, v = np.split(joined, [x.shape[1], x.shape[1] + size], axis=1)
            q, k, v = _split(q, heads), _split(k, 1), _split(v, 1)
        elif is_bigcode:
            q, k, v = joined.reshape(len(ids), heads, 3, size).transpose(2, 1, 0, 3)
        else:
            q, k, v = (_split(part, heads) for part in np.split(joined, 3, axis=1))
        attended = _attend(q, k, v)
        if is_bigcode:
            x = x + _linear(attended, w, at + "attn.c_proj")
            inner = _linear(_norm(x, w, at + "ln_2", epsilon), w, at + "mlp.c_fc")
            x = x + _linear(_gelu_tanh(inner), w, at + "mlp.c_proj")
        else:
            x = x + attended @ w[at + "attn.c_proj.weight"] + w[at + "attn.c_proj.bias"]
            inner = _norm(x, w, at + "ln_2", epsilon) @ w[at + "mlp.c_fc.weight"]
            inner = _gelu_tanh(inner + w[at + "mlp.c_fc.bias"])
            x = x + inner @ w[at + "mlp.c_proj.weight"] + w[at + "mlp.c_proj.bias"]
    head = w.get("lm_head.weight", w["transformer.wte.weight"])
    return _norm(x, w, "transformer.ln_f", epsilon) @ head.T


def _gpt_neox(config: Mapping[str, Any], w: Mapping[str, Array], ids: NDArray[Any]) -> Array:
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    x = w["gpt_neox.embed_in.weight"][ids]
    size = x.shape[1] // heads
    rope = config["rope_parameters"]
    rotated = int(size * rope["partial_rotary_factor"])
    for layer in range(config["num_hidden_layers"]):
        at = f"gpt_neox.layers.{layer}."
        joined = _linear(
            _norm(x, w, at + "input_layernorm", epsilon), w, at + "attention.query_key_value"
        )
        q, k, v = joined.reshape(len(ids), heads, 3, size).transpose(2, 1, 0, 3)
        q, k = (_rotate_halves(part, rotated, rope["rope_theta"]) for part in (q, k))
        attended = _linear(_attend(q, k, v), w, at + "attention.dense")
        source = x if config["use_parallel_residual"] else x + attended
        normed = _norm(source, w, at + "post_attention_layernorm", epsilon)
        inner = _gelu(_linear(normed, w, at + "mlp.dense_h_to_4h"))
        x = x + attended + _linear(inner, w, at + "mlp.dense_4h_to_h")
    return _norm(x, w, "gpt_neox.final_layer_norm", epsilon) @ w["embed_out.weight"].T


def _gptj(config: Mapping[str, Any], w: Mapping[str, Array], ids: NDArray[Any]) -> Array:
    heads, epsilon = config["n_head"], config["layer_norm_epsilon"]
    x = w["transformer.wte.weight"][ids]
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."
        normed = _norm(x, w, at + "ln_1", epsilon)
        q, k, v = (_split(_linear(normed, w, f"{at}attn.{part}_proj"), heads) for part in "qkv")
        q, k = (_rotate_neighbours(part, config["rotary_dim"], 10000.0) for part in (q, k))
        inner = _gelu_tanh(_linear(normed, w, at + "mlp.fc_in"))
        x = x + _linear(_attend(q, k, v), w, at + "attn.out_proj")
        x = x + _linear(inner, w, at + "mlp.fc_out")
    return _linear(_norm(x, w, "transformer.ln_f", epsilon), w, "lm_head")


def _phi(config: Mapping[str, Any], w: Mapping[str, Array], ids: NDArray[Any]) -> Array:
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    rope = config["rope_parameters"]
    rotated = int(x.shape[1] // heads * rope["partial_rotary_factor"])
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = _norm(x, w, at + "input_layernorm", epsilon)
        q, k, v = (
            _split(_linear(normed, w, f"{at}self_attn.{part}_proj"), heads) for part in "qkv"
        )
        q, k = (_rotate_halves(part, rotated, rope["rope_theta"]) for part in (q, k))
        inner = _gelu_tanh(_linear(normed, w, at + "mlp.fc1"))
        x = x + _linear(_attend(q, k, v), w, at + "self_attn.dense")
        x = x + _linear(inner, w, at + "mlp.fc2")
    return _linear(_norm(x, w, "model.final_layernorm", epsilon), w, "lm_head")


def _split(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)  # (n, h*d) -> (h, n, d)


def _attend(q: Array, k: Array, v: Array) -> Array:
    """Return causal attention (n, h*d); q, k, v (h, n, d), or one head of k and v for all."""
    n, size = q.shape[1:]
    scores = q @ k.swapaxes(1, 2) / math.sqrt(size)
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: Array = (weight / weight.sum(axis=-1, keepdims=True)) @ v
    return out.swapaxes(0, 1).reshape(n, -1)


def _turns(n: int, dim: int, base: float) -> NDArray[np.complex128]:
    return np.exp(1j * np.outer(np.arange(n), base ** (-np.arange(0, dim, 2) / dim)))


def _rotate_halves(x: Array, dim: int, base: float) -> Array:
    turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 : dim]) * _turns(x.shape[1], dim, base)
    return np.concatenate([turned.real, turned.imag, x[..., dim:]], axis=-1)


def _rotate_neighbours(x: Array, dim: int, base: float) -> Array:
    turned = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * _turns(x.shape[1], dim, base)
    pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:-1], dim)
    return np.concatenate([pairs, x[..., dim:]], axis=-1)


def _norm(x: Array, w: Mapping[str, Array], name: str, epsilon: float) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon)
    out: Array = centered / deviation * w[name + ".weight"] + w[name + ".bias"]
    return out


def _linear(x: Array, w: Mapping[str, Array], name: str) -> Array:
    out: Array = x @ w[name + ".weight"].T
    return out + w[name + ".bias"] if name + ".bias" in w else out


def _gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def _gelu_tanh(x: Array) -> Array:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


_FORWARDS = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "phi": _phi,
}
MODEL_TYPES = tuple(_FORWARDS)
