"""RWKV-5, RWKV-6 and Qwen3.5 in plain NumPy: the second opinion that tests compare against.

Written from the papers (Peng et al. 2024, Eagle and Finch; Yang et al. 2024, Gated DeltaNet) and
the names of checkpoints. Shares no code with mlc_llm and computes in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MODEL_TYPES = ("rwkv5", "rwkv6", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


class Tensors:
    """Weights of a part of the model, by the rest of their names, as float64."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], prefix: str = "") -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Array:
        return self._weights[self._prefix + name].astype(np.float64)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._weights

    def of(self, part: str) -> Tensors:
        return Tensors(self._weights, f"{self._prefix}{part}.")


def forward(
    config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], token_ids: Sequence[int]
) -> Array:
    """Return logits (n, vocab) of one sequence; weights have Hugging Face names, any dtype."""
    run = _qwen if config["model_type"].startswith("qwen") else _rwkv
    return run(config, Tensors(weights), np.asarray(token_ids))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _layer_norm(x: Array, part: Tensors, epsilon: float) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
    return centered / scale * part["weight"] + part["bias"]


def _rwkv(config: Mapping[str, Any], tensors: Tensors, token_ids: NDArray[Any]) -> Array:
    model, epsilon = tensors.of("rwkv"), config["layer_norm_epsilon"]
    rescale_every = config["rescale_every"] or 10**9
    x = model["embeddings.weight"][token_ids]
    x = _layer_norm(x, model.of("blocks.0.pre_ln"), epsilon)
    for index in range(config["num_hidden_layers"]):
        block = model.of(f"blocks.{index}")
        # In half precision the authors keep the residual small; the final norm undoes it.
        shrunk = 2.0 ** -(index // rescale_every)
        mix = _eagle_mix if config["model_type"] == "rwkv5" else _finch_mix
        x = x + shrunk * _time_mix(config, block.of("attention"), mix, _norm1(x, block, epsilon))
        normed = _layer_norm(x, block.of("ln2"), epsilon)
        x = x + shrunk * _channel_mix(block.of("feed_forward"), normed)
        if (index + 1) % rescale_every == 0:
            x = x / 2
    return _layer_norm(x, model.of("ln_out"), epsilon) @ tensors["head.weight"].T


def _norm1(x: Array, block: Tensors, epsilon: float) -> Array:
    return _layer_norm(x, block.of("ln1"), epsilon)


def _shifted(x: Array) -> Array:
    return np.concatenate([np.zeros((1, x.shape[1])), x[:-1]])


def _eagle_mix(part: Tensors, x: Array) -> dict[str, Array]:
    """Return r, k, v and g, and decays w, of all tokens: Eagle's equations 3 to 5."""
    last = _shifted(x)
    found = {}
    for letter, name in zip("rkvg", ("receptance", "key", "value", "gate"), strict=True):
        mu = part[f"time_mix_{name}"].reshape(-1)
        found[letter] = (mu * x + (1 - mu) * last) @ part[f"{name}.weight"].T
    decay = np.exp(-np.exp(part["time_decay"].reshape(-1)))
    return {**found, "w": np.tile(decay, (len(x), 1))}


def _finch_mix(part: Tensors, x: Array) -> dict[str, Array]:
    """Return the same of Finch: ddlerp and lora, equations 11 to 15."""
    change = _shifted(x) - x
    low = np.tanh((x + change * part["time_maa_x"].reshape(-1)) @ part["time_maa_w1"])
    low = low.reshape(len(x), 5, -1)
    mixed = {
        letter: x
        + change * (part[f"time_maa_{letter}"].reshape(-1) + low[:, i] @ part["time_maa_w2"][i])
        for i, letter in enumerate("wkvrg")
    }
    names = {"r": "receptance", "k": "key", "v": "value", "g": "gate"}
    found = {key: mixed[key] @ part[f"{name}.weight"].T for key, name in names.items()}
    lora = np.tanh(mixed["w"] @ part["time_decay_w1"]) @ part["time_decay_w2"]
    return {**found, "w": np.exp(-np.exp(part["time_decay"].reshape(-1) + lora))}


def _time_mix(config: Mapping[str, Any], part: Tensors, mix: Any, x: Array) -> Array:
    n, size = len(x), config["head_size"]
    heads = {key: rows.reshape(n, -1, size) for key, rows in mix(part, x).items()}
    bonus = part["time_faaaa"]
    state = np.zeros((len(bonus), size, size))  # (h, key, value)
    out = np.zeros((n, len(bonus), size))
    for t in range(n):
        r, k, v, w = (heads[key][t] for key in "rkvw")
        product = np.einsum("hi,hj->hij", k, v)
        out[t] = np.einsum("hi,hij->hj", r, bonus[:, :, None] * product + state)
        state = w[:, :, None] * state + product
    divided = out / config["head_size_divisor"]
    centered = divided - divided.mean(-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    scaled = normed.reshape(n, -1) * part["ln_x.weight"] + part["ln_x.bias"]
    return (scaled * _silu(heads["g"].reshape(n, -1))) @ part["output.weight"].T


def _channel_mix(part: Tensors, x: Array) -> Array:
    last = _shifted(x)
    try:
        mu_k, mu_r = part["time_mix_key"], part["time_mix_receptance"]
    except KeyError:  # Finch counts from the other end
        mu_k, mu_r = 1 - part["time_maa_k"], 1 - part["time_maa_r"]
    k, r = (mu.reshape(-1) * x + (1 - mu.reshape(-1)) * last for mu in (mu_k, mu_r))
    hidden = np.maximum(k @ part["key.weight"].T, 0) ** 2
    return _sigmoid(r @ part["receptance.weight"].T) * (hidden @ part["value.weight"].T)


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def _qwen(config: Mapping[str, Any], tensors: Tensors, token_ids: NDArray[Any]) -> Array:
    model, epsilon = tensors.of("model"), config["rms_norm_eps"]
    x = model["embed_tokens.weight"][token_ids]
    for index in range(config["num_hidden_layers"]):
        kind = _kind(config, index)
        layer = model.of(f"layers.{index}")
        normed = _rms_norm(x, 1 + layer["input_layernorm.weight"], epsilon)
        if kind == "linear_attention":
            x = x + _delta_net(config, layer.of("linear_attn"), normed)
        else:
            x = x + _gated_attention(config, layer.of("self_attn"), normed)
        normed = _rms_norm(x, 1 + layer["post_attention_layernorm.weight"], epsilon)
        mix = _mixture if "mlp.gate.weight" in layer else _gated
        x = x + mix(config, layer.of("mlp"), normed)
    return _rms_norm(x, 1 + model["norm.weight"], epsilon) @ tensors["lm_head.weight"].T


def _kind(config: Mapping[str, Any], layer: int) -> str:
    if "layer_types" in config:
        return str(config["layer_types"][layer])
    every = config["full_attention_interval"]
    return "linear_attention" if (layer + 1) % every else "full_attention"


def _gated(config: Mapping[str, Any], part: Tensors, x: Array) -> Array:
    gate, up = (x @ part[f"{name}_proj.weight"].T for name in ("gate", "up"))
    return (_silu(gate) * up) @ part["down_proj.weight"].T


def _mixture(config: Mapping[str, Any], part: Tensors, x: Array) -> Array:
    """Mix the best experts by their share of the softmax, and add the one that all share."""
    logits = x @ part["gate.weight"].T
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores = scores / scores.sum(-1, keepdims=True)
    out = _gated(config, part.of("shared_expert"), x)
    out = out * _sigmoid(x @ part["shared_expert_gate.weight"].T)
    for token, row in enumerate(scores):
        best = np.argsort(-row)[: config["num_experts_per_tok"]]
        share = row[best] / row[best].sum() if config.get("norm_topk_prob", True) else row[best]
        for expert, weight in zip(best, share, strict=True):
            made = _gated(config, part.of(f"experts.{expert}"), x[token : token + 1])
            out[token] += weight * made[0]
    return out


def _gated_attention(config: Mapping[str, Any], part: Tensors, x: Array) -> Array:
    n, size = len(x), config["head_dim"]
    pair = (x @ part["q_proj.weight"].T).reshape(n, -1, 2, size)
    q, gate = pair[:, :, 0], pair[:, :, 1]
    k, v = ((x @ part[f"{name}_proj.weight"].T).reshape(n, -1, size) for name in "kv")
    q = _turn(config, _rms_norm(q, 1 + part["q_norm.weight"], config["rms_norm_eps"]))
    k = _turn(config, _rms_norm(k, 1 + part["k_norm.weight"], config["rms_norm_eps"]))
    k, v = (np.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size)
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hts,shd->thd", weight / weight.sum(-1, keepdims=True), v)
    return (out * _sigmoid(gate)).reshape(n, -1) @ part["o_proj.weight"].T


def _turn(config: Mapping[str, Any], x: Array) -> Array:
    """Rotate the first dimensions of each head (n, h, d), in halves."""
    rope = config.get("rope_parameters", config)
    half = int(config["head_dim"] * rope["partial_rotary_factor"]) // 2
    angles = np.outer(np.arange(len(x)), rope["rope_theta"] ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def _delta_inputs(config: Mapping[str, Any], part: Tensors, x: Array) -> list[Array]:
    """Return [q; k; v], z, b and a of all tokens; Qwen3-Next has them key head by key head."""
    if "in_proj_qkv.weight" in part:
        return [x @ part[f"in_proj_{name}.weight"].T for name in ("qkv", "z", "b", "a")]
    n, groups = len(x), config["linear_num_key_heads"]
    size = config["linear_key_head_dim"]
    qkvz, ba = (x @ part[f"in_proj_{name}.weight"].T for name in ("qkvz", "ba"))
    qkvz, ba = qkvz.reshape(n, groups, -1), ba.reshape(n, groups, -1)
    half = (qkvz.shape[-1] - 2 * size) // 2
    q, k, v, z = np.split(qkvz, [size, 2 * size, 2 * size + half], axis=-1)
    b, a = np.split(ba, 2, axis=-1)
    q, k, v, z, b, a = (y.reshape(n, -1) for y in (q, k, v, z, b, a))
    return [np.concatenate([q, k, v], axis=1), z, b, a]


def _delta_net(config: Mapping[str, Any], part: Tensors, x: Array) -> Array:
    n = len(x)
    key_heads, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_size, value_size = config["linear_key_head_dim"], config["linear_value_head_dim"]
    filters = part["conv1d.weight"][:, 0]  # (channels, taps)
    taps = filters.shape[1]
    qkv, z, b, a = _delta_inputs(config, part, x)
    padded = np.pad(qkv, ((taps - 1, 0), (0, 0)))
    mixed = _silu(sum(padded[j : j + n] * filters[:, j] for j in range(taps)))
    q, k, v = np.split(mixed, [key_heads * key_size, 2 * key_heads * key_size], axis=1)
    q, k = (y.reshape(n, key_heads, key_size) for y in (q, k))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    q, k = (np.repeat(y, heads // key_heads, axis=1) for y in (q / np.sqrt(key_size), k))
    v = v.reshape(n, heads, value_size)
    step = np.logaddexp(0, a + part["dt_bias"])
    decay = np.exp(-np.exp(part["A_log"]) * step)  # (n, h)
    beta = _sigmoid(b)
    state = np.zeros((heads, key_size, value_size))
    out = np.zeros((n, heads, value_size))
    for t in range(n):
        state = state * decay[t][:, None, None]
        error = v[t] - np.einsum("hi,hij->hj", k[t], state)
        state = state + np.einsum("hi,hj->hij", beta[t][:, None] * k[t], error)
        out[t] = np.einsum("hi,hij->hj", q[t], state)
    normed = _rms_norm(out, part["norm.weight"], config["rms_norm_eps"])
    gate = z.reshape(n, heads, value_size)
    return (normed * _silu(gate)).reshape(n, -1) @ part["out_proj.weight"].T
