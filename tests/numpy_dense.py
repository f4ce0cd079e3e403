"""Dense relatives of Llama in plain NumPy: a second opinion on their arithmetic.

Knows published configurations and tensor names. A family is a `Model`: what it does differently,
with its tensors under Llama's names. Shares no code with mlc_llm, computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy_deepseek
from numpy.typing import NDArray
from numpy_dense_names import RENAMED

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]
Config = Mapping[str, Any]


@dataclass
class Model:
    """How a family computes; factors of one, windows of none and so on are Llama's."""

    weights: dict[str, Array]
    heads: int
    kv_heads: int
    size: int
    layers: int
    epsilon: float
    # Of each layer: rotary parameters, None for no rotation; and its window.
    ropes: list[Mapping[str, Any] | None]
    windows: list[int | None]
    activation: Callable[[Array], Array]
    norm: str = "rms"  # or "rms+1", "layer", "layer+1"
    # Norms around a half: "before", "after", "both", or "parallel" halves with one norm.
    order: str = "before"
    is_interleaved: bool = False
    rotates_first: bool = False  # before the norms of heads, not after them
    alibi: bool = False
    scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    clip: float = math.inf
    embedding_factor: float = 1
    residual_factor: float = 1
    logit_factor: float = 1
    num_best: int = 0  # experts of a token, where there are any
    # (start of names, x): what mixes experts, where these are not Mixtral's.
    experts: Callable[[str, Array], Array] | None = None
    # What queries grow by each time that so many tokens went before.
    query_growth: float = 0
    query_period: int = 1


def forward(config: Config, weights: Weights, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have their published names, any dtype."""
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return run(read_model(config, wide), token_ids)


def run(model: Model, token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence."""
    w, factor = model.weights, model.residual_factor
    x = w["embed_tokens.weight"][np.asarray(token_ids)] * model.embedding_factor
    for layer in range(model.layers):
        at = f"layers.{layer}."
        if model.order == "before":
            normed = _norm(model, x, at + "input_layernorm")
            x = x + factor * _attention(model, layer, normed)
            normed = _norm(model, x, at + "post_attention_layernorm")
            x = x + factor * _mlp(model, layer, normed)
        elif model.order == "parallel":
            normed = _norm(model, x, at + "input_layernorm")
            x = x + _attention(model, layer, normed) + _mlp(model, layer, normed)
        else:
            has_first = model.order == "both"
            inner = _norm(model, x, at + "input_layernorm") if has_first else x
            inner = _attention(model, layer, inner)
            x = x + _norm(model, inner, at + "post_attention_layernorm")
            inner = _norm(model, x, at + "pre_feedforward_layernorm") if has_first else x
            x = x + _norm(model, _mlp(model, layer, inner), at + "post_feedforward_layernorm")
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    logits = _norm(model, x, "norm") @ head.T * model.logit_factor
    cap = model.logit_cap
    return logits if cap is None else cap * np.tanh(logits / cap)


def _attention(model: Model, layer: int, hidden: Array) -> Array:
    n, at = len(hidden), f"layers.{layer}.self_attn."
    parts = [
        _linear(model, f"{at}{part}_proj", hidden).clip(-model.clip, model.clip) for part in "qkv"
    ]
    q_norm, k_norm = (model.weights.get(f"{at}{part}_norm.weight") for part in "qk")
    if q_norm is not None and q_norm.shape == parts[0].shape[1:]:  # all heads at once
        parts[0] = _norm(model, parts[0], at + "q_norm")
        parts[1] = _norm(model, parts[1], at + "k_norm")
    q, k, v = (part.reshape(n, -1, model.size).swapaxes(0, 1) for part in parts)  # (h, n, d)
    rope = model.ropes[layer]
    if rope is not None and model.rotates_first:
        q, k = (_rotate(part, rope, model.is_interleaved) for part in (q, k))
    if q_norm is not None and k_norm is not None and q_norm.shape[-1] == model.size:
        q, k = _head_norm(model, q, q_norm), _head_norm(model, k, k_norm)
    if rope is not None and not model.rotates_first:
        q, k = (_rotate(part, rope, model.is_interleaved) for part in (q, k))
    k, v = (np.repeat(part, model.heads // model.kv_heads, axis=0) for part in (k, v))
    steps = np.arange(n) // model.query_period
    q = q * (1 + model.query_growth * np.log(1 + steps))[:, None]
    scores = q @ k.swapaxes(1, 2) * (model.scale or model.size**-0.5)
    if model.score_cap is not None:
        scores = model.score_cap * np.tanh(scores / model.score_cap)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    if model.alibi:
        scores = scores - _slopes(model.heads)[:, None, None] * distance
    visible = (distance >= 0) & (distance < (model.windows[layer] or n))
    scores = np.where(visible, scores, -np.inf)
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    output = (weight / weight.sum(axis=-1, keepdims=True)) @ v
    return _linear(model, at + "o_proj", output.swapaxes(0, 1).reshape(n, -1))


def _mlp(model: Model, layer: int, hidden: Array) -> Array:
    at = f"layers.{layer}.mlp."
    mixed = 0
    if at + "experts.0.w1.weight" in model.weights:
        mixed = _experts(model, at, hidden)
        if at + "up_proj.weight" not in model.weights:
            return mixed
    if model.experts is not None and at + "gate.weight" in model.weights:
        return model.experts(at, hidden)
    up = _linear(model, at + "up_proj", hidden)
    if at + "gate_proj.weight" not in model.weights:
        return _linear(model, at + "down_proj", model.activation(up))
    gate = model.activation(_linear(model, at + "gate_proj", hidden))
    return _linear(model, at + "down_proj", gate * up) + mixed


def _experts(model: Model, at: str, hidden: Array) -> Array:
    """Mix the best experts of each token by the softmax of their logits."""
    out = np.zeros_like(hidden)
    for token, logits in enumerate(_linear(model, at + "gate", hidden)):
        best = np.argsort(-logits)[: model.num_best]
        share = np.exp(logits[best] - logits[best].max())
        for expert, weight in zip(best, share / share.sum(), strict=True):
            w1, w2, w3 = (model.weights[f"{at}experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            x = hidden[token]
            out[token] += weight * ((model.activation(x @ w1.T) * (x @ w3.T)) @ w2.T)
    return out


def _linear(model: Model, name: str, hidden: Array) -> Array:
    return hidden @ model.weights[name + ".weight"].T + model.weights.get(name + ".bias", 0)


def _norm(model: Model, x: Array, name: str) -> Array:
    w = model.weights.get(name + ".weight", np.ones(1)) + model.norm.endswith("+1")
    if model.norm.startswith("layer"):
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.epsilon)
    return x * w + model.weights.get(name + ".bias", 0)


def _head_norm(model: Model, x: Array, weight: Array) -> Array:
    """Normalise heads (h, n, d) with weights (d), or (h, d) and layer norm."""
    if weight.ndim == 2:
        x, weight = x - x.mean(axis=-1, keepdims=True), weight[:, None]
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.epsilon)
    return x * (weight + model.norm.endswith("+1"))


def _slopes(heads: int) -> Array:
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    return np.asarray(first + [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)])


def _rotate(x: Array, rope: Mapping[str, Any], is_interleaved: bool) -> Array:
    """Rotate heads (h, n, d), the first dimensions of each."""
    dim = int(x.shape[-1] * (rope.get("partial_rotary_factor") or 1))
    frequencies, magnitude = rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim), 1.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    elif kind == "yarn":
        frequencies, magnitude, _ = numpy_deepseek.rotary({**rope, "rope_type": kind}, dim)
    elif kind == "longrope":
        # Texts of the tests are all longer than what was trained.
        frequencies = frequencies / np.asarray(rope["long_factor"])
        trained, longest = rope["original_max_position_embeddings"], rope["longest"]
        magnitude = math.sqrt(1 + math.log(longest / trained) / math.log(trained))
    turn = magnitude * np.exp(1j * np.outer(np.arange(x.shape[1]), frequencies))
    if is_interleaved:
        turned = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * turn
        pairs = np.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:-1], dim)
        return np.concatenate([pairs, x[..., dim:]], axis=-1)
    turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 : dim]) * turn
    return np.concatenate([turned.real, turned.imag, x[..., dim:]], axis=-1)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _relu_squared(x: Array) -> Array:
    return np.maximum(x, 0) ** 2


def read_model(config: Config, weights: dict[str, Array]) -> Model:
    """Return the family of a configuration with its weights."""
    kind = config["model_type"]
    if "text_config" in config:
        config = {**config["text_config"], "model_type": kind}
    layers = config.get("num_hidden_layers") or config["num_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config.get("multi_query_group_num") or heads
    size = config.get("head_dim") or config.get("kv_channels") or config["hidden_size"] // heads
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layernorm_epsilon")
    epsilon = next((config[name] for name in names if name in config), 1e-5)
    named = RENAMED[kind](config, weights) if kind in RENAMED else weights
    model = Model(
        {
            name.removeprefix("language_model.").removeprefix("model."): w
            for name, w in named.items()
        },
        *(heads, kv_heads, size, layers, epsilon),
        ropes=[_rope(config)] * layers,
        windows=[config.get("sliding_window")] * layers,
        activation=_silu,
    )
    _DIFFERENCES.get(kind, lambda model, config: None)(model, config)
    return model


def _rope(config: Config) -> Mapping[str, Any]:
    found = config.get("rope_parameters")
    if found is None:
        share = {"partial_rotary_factor": config.get("partial_rotary_factor")}
        base = config.get("rope_theta", 10000.0)
        found = {"rope_theta": base, **share, **(config.get("rope_scaling") or {})}
    return {**found, "longest": config.get("max_position_embeddings")}


def _gemma(model: Model, config: Config) -> None:
    model.norm, model.activation = "rms+1", _gelu
    model.embedding_factor = math.sqrt(config["hidden_size"])


def _gemma2(model: Model, config: Config) -> None:
    _gemma(model, config)
    model.order, model.scale = "both", config["query_pre_attn_scalar"] ** -0.5
    model.score_cap = config["attn_logit_softcapping"]
    model.logit_cap = config["final_logit_softcapping"]
    types = config.get("layer_types") or ["sliding_attention", "full_attention"] * model.layers
    model.windows = [
        config["sliding_window"] if kind == "sliding_attention" else None
        for kind in types[: model.layers]
    ]


def _gemma3(model: Model, config: Config) -> None:
    every_sixth = (["sliding_attention"] * 5 + ["full_attention"]) * model.layers
    types = (config.get("layer_types") or every_sixth)[: model.layers]
    _gemma2(model, {**config, "layer_types": types})
    ropes = config.get("rope_parameters") or {
        "full_attention": {"rope_theta": config["rope_theta"]},
        "sliding_attention": {"rope_theta": config["rope_local_base_freq"]},
    }
    model.ropes = [ropes[kind] for kind in types]


def _baichuan(model: Model, config: Config) -> None:
    if "max_position_embeddings" not in config:
        model.ropes, model.alibi = [None] * model.layers, True
    if "z_loss_weight" in config:
        head = model.weights["lm_head.weight"]
        head = head / np.sqrt((head**2).sum(axis=1, keepdims=True))
        model.weights["lm_head.weight"] = head


def _qwen3(model: Model, config: Config) -> None:
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = config["max_window_layers"]
    model.windows = [window if layer >= first else None for layer in range(model.layers)]


def _minicpm(model: Model, config: Config) -> None:
    model.embedding_factor = config["scale_emb"]
    model.residual_factor = config["scale_depth"] / math.sqrt(model.layers)
    model.logit_factor = config["dim_model_base"] / config["hidden_size"]
    model.num_best = config.get("num_experts_per_tok", 0)


def _cohere(model: Model, config: Config) -> None:
    model.norm, model.order, model.is_interleaved = "layer", "parallel", True
    model.logit_factor = config["logit_scale"]


def _stablelm(model: Model, config: Config) -> None:
    model.norm = "layer"
    if config.get("use_parallel_residual"):
        model.order = "parallel"
    for layer in range(model.layers if config.get("qk_layernorm") else 0):
        at = f"layers.{layer}.self_attn."
        for part, heads in (("q", model.heads), ("k", model.kv_heads)):
            names = [f"{at}{part}_layernorm.norms.{head}.weight" for head in range(heads)]
            weights = [model.weights[name] for name in names]
            model.weights[f"{at}{part}_norm.weight"] = np.stack(weights)


def _chatglm(model: Model, config: Config) -> None:
    rope = {"rope_theta": 10000.0 * config["rope_ratio"], "partial_rotary_factor": 0.5}
    model.ropes, model.is_interleaved = [rope] * model.layers, True


def _qwen(model: Model, config: Config) -> None:
    model.ropes = [{"rope_theta": config["rotary_emb_base"]}] * model.layers
    model.epsilon = config["layer_norm_epsilon"]


def _ministral3(model: Model, config: Config) -> None:
    rope = config["rope_parameters"]
    model.query_growth = rope["llama_4_scaling_beta"]
    model.query_period = rope["original_max_position_embeddings"]


def _internlm(model: Model, config: Config) -> None:
    model.ropes = [{"rope_theta": config["rotary"]["base"]}] * model.layers


def _set(**values: Any) -> Callable[[Model, Config], None]:
    def change(model: Model, config: Config) -> None:
        for name, value in values.items():
            setattr(model, name, value)

    return change


_DIFFERENCES: dict[str, Callable[[Model, Config], None]] = {
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "olmo": lambda model, config: _set(norm="layer", clip=config["clip_qkv"] or math.inf)(
        model, config
    ),
    "olmo2": _set(order="after"),
    "stablelm": _stablelm,
    "internlm": _internlm,
    # Its scaling begins beyond the trained length.
    "internlm2": lambda model, config: _set(
        ropes=[{"rope_theta": config["rope_theta"]}] * model.layers
    )(model, config),
    "baichuan": _baichuan,
    "orion": _set(norm="layer"),
    "minicpm": _minicpm,
    "nemotron": _set(norm="layer+1", activation=_relu_squared),
    "cohere": _cohere,
    "starcoder2": _set(norm="layer", activation=_gelu),
    "chatglm": _chatglm,
    "qwen": _qwen,
    "mistral3": _ministral3,
    "ministral3": _ministral3,
}


MODEL_TYPES = ("phi3", *_DIFFERENCES)
