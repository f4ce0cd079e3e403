"""BERT in plain NumPy: the second opinion for encoders.

Knows Hugging Face configurations and tensor names, without the prefix "bert.". Shares no code with
mlc_llm and computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]


def bert_states(config: Mapping[str, Any], weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return the hidden states (n, hidden) of one text after the last layer."""
    epsilon = config["layer_norm_eps"]
    n = len(token_ids)
    tables = {
        part: weights[f"embeddings.{part}_embeddings.weight"].astype(np.float64)
        for part in ("word", "position", "token_type")
    }
    x = tables["word"][list(token_ids)] + tables["position"][:n] + tables["token_type"][0]
    x = _norm(x, weights, "embeddings.LayerNorm", epsilon)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        attended = _attention(config, weights, prefix + "attention.self.", x)
        x = x + _linear(weights, prefix + "attention.output.dense", attended)
        x = _norm(x, weights, prefix + "attention.output.LayerNorm", epsilon)
        inner = _gelu(_linear(weights, prefix + "intermediate.dense", x), config["hidden_act"])
        x = x + _linear(weights, prefix + "output.dense", inner)
        x = _norm(x, weights, prefix + "output.LayerNorm", epsilon)
    return x


def _attention(config: Mapping[str, Any], weights: Weights, prefix: str, x: Array) -> Array:
    heads = config["num_attention_heads"]
    q, k, v = (
        _linear(weights, prefix + part, x).reshape(len(x), heads, -1).swapaxes(0, 1)
        for part in ("query", "key", "value")
    )  # (n, h*d) -> (h, n, d)
    scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    output = weight / weight.sum(axis=-1, keepdims=True) @ v
    return output.swapaxes(0, 1).reshape(len(x), -1)


def _gelu(x: Array, kind: str) -> Array:
    if kind == "gelu_new":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert kind == "gelu", kind
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _linear(weights: Weights, name: str, x: Array) -> Array:
    product: Array = x @ weights[name + ".weight"].astype(np.float64).T
    return product + weights[name + ".bias"].astype(np.float64)


def _norm(x: Array, weights: Weights, name: str, epsilon: float) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    scaled: Array = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon)
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]
