"""Families that MLC LLM never had, relatives of Llama too, in plain NumPy: a second opinion.

Each is a `numpy_dense.Model` with what it does differently. Shares no code with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy_deepseek
from numpy.typing import NDArray
from numpy_dense import Model, read_model, run
from numpy_dense_names import split_rows

Array = NDArray[np.float64]
Config = Mapping[str, Any]


def forward(config: Config, weights: Mapping[str, NDArray[Any]], token_ids: Sequence[int]) -> Array:
    """Return logits (n, vocab) of one sequence; weights have their published names, any dtype."""
    kind = config["model_type"]
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    wide = _NAMES.get(kind, lambda config, weights: weights)(config, wide)
    model = read_model(config, wide)
    _DIFFERENCES[kind](model, config)
    return run(model, token_ids)


def _kinds(config: Config) -> list[str]:
    """Return what each layer is, from the list or from the pattern of older configurations."""
    if "layer_types" in config:
        return list(config["layer_types"])
    every = config["sliding_window_pattern"]
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["full_attention" if layer % every == 0 else "sliding_attention" for layer in layers]


def _window(model: Model, config: Config) -> list[bool]:
    """Give windows to the layers that have them; return which do."""
    is_local = [kind == "sliding_attention" for kind in _kinds(config)]
    model.windows = [config["sliding_window"] if local else None for local in is_local]
    return is_local


def _smollm3(model: Model, config: Config) -> None:
    _window(model, config)
    ropes = zip(model.ropes, config["no_rope_layers"], strict=True)
    model.ropes = [rope if has_rope else None for rope, has_rope in ropes]


def _granite(model: Model, config: Config) -> None:
    model.embedding_factor = config["embedding_multiplier"]
    model.residual_factor = config["residual_multiplier"]
    model.logit_factor = 1 / config["logits_scaling"]
    model.scale = config["attention_multiplier"]
    model.num_best = config.get("num_experts_per_tok", 0)


def _granite_hybrid(model: Model, config: Config) -> None:
    _granite(model, config)
    if config["position_embedding_type"] != "rope":
        model.ropes = [None] * model.layers


def _cohere2(model: Model, config: Config) -> None:
    model.norm, model.order, model.is_interleaved = "layer", "parallel", True
    model.logit_factor = config["logit_scale"]
    _rotate_local(model, config)


def _exaone4(model: Model, config: Config) -> None:
    model.order = "after"
    _rotate_local(model, config)


def _rotate_local(model: Model, config: Config) -> None:
    is_local = _window(model, config)
    model.ropes = [
        rope if local else None for rope, local in zip(model.ropes, is_local, strict=True)
    ]


def _glm(model: Model, config: Config) -> None:
    model.is_interleaved = True


def _glm4(model: Model, config: Config) -> None:
    model.is_interleaved, model.order = True, "both"


def _olmo3(model: Model, config: Config) -> None:
    model.order = "after"
    _window(model, config)
    model.ropes = [config["rope_parameters"][kind] for kind in _kinds(config)]


def _arcee(model: Model, config: Config) -> None:
    model.activation = lambda x: np.maximum(x, 0) ** 2


def _glm4_moe(model: Model, config: Config) -> None:
    model.experts = lambda at, x: numpy_deepseek.experts(config, model.weights, at, x)


def _dots1(model: Model, config: Config) -> None:
    _glm4_moe(model, config)
    _window(model, config)


def _hunyuan(model: Model, config: Config) -> None:
    scaling, size = config["rope_scaling"], config["head_dim"]
    base = config["rope_theta"] * scaling["alpha"] ** (size / (size - 2))
    model.ropes, model.rotates_first = [{"rope_theta": base}] * model.layers, True


_DIFFERENCES: dict[str, Callable[[Model, Config], None]] = {
    "smollm3": _smollm3,
    "granite": _granite,
    "granitemoe": _granite,
    "granitemoeshared": _granite,
    "granitemoehybrid": _granite_hybrid,
    "cohere2": _cohere2,
    "exaone4": _exaone4,
    "glm": _glm,
    "glm4": _glm4,
    "olmo3": _olmo3,
    "seed_oss": lambda model, config: None,
    "ernie4_5": _glm,
    "arcee": _arcee,
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
    "hunyuan_v1_dense": _hunyuan,
}
MODEL_TYPES = tuple(_DIFFERENCES)


def _rename(*pairs: tuple[str, str]) -> Callable[[Config, dict[str, Array]], dict[str, Array]]:
    def rename(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
        renamed = {}
        for name, weight in weights.items():
            for theirs, llamas in pairs:
                name = name.replace(theirs, llamas)
            renamed[name] = weight
        return renamed

    return rename


def _split_gate_up(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    weights = dict(weights)
    for name in [name for name in weights if name.endswith("gate_up_proj.weight")]:
        at, half = name.removesuffix("gate_up_proj.weight"), len(weights[name]) // 2
        split_rows(weights, f"{at}gate_up_proj", {f"{at}gate_proj": half, f"{at}up_proj": half})
    return weights


def _glm4_names(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    rename = _rename(
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )
    return _split_gate_up(config, rename(config, weights))


def _granite_names(config: Config, weights: dict[str, Array]) -> dict[str, Array]:
    """Take stacked experts apart, and call the shared one an ordinary feed-forward layer."""
    rename = _rename(
        ("block_sparse_moe.router.layer", "mlp.gate"),
        ("shared_mlp.input_linear", "mlp.gate_up_proj"),
        ("shared_mlp.output_linear", "mlp.down_proj"),
    )
    weights = _split_gate_up(config, rename(config, weights))
    for name in [name for name in weights if "block_sparse_moe" in name]:
        stacked, at = weights.pop(name), name.split("block_sparse_moe")[0] + "mlp.experts."
        for expert, rows in enumerate(stacked):
            if "input_linear" in name:
                w1, w3 = np.split(rows, 2)
                weights.update({f"{at}{expert}.w1.weight": w1, f"{at}{expert}.w3.weight": w3})
            else:
                weights[f"{at}{expert}.w2.weight"] = rows
    return weights


_NAMES: dict[str, Callable[[Config, dict[str, Array]], dict[str, Array]]] = {
    "glm": _split_gate_up,
    "hunyuan_v1_dense": _rename(("query_layernorm", "q_norm"), ("key_layernorm", "k_norm")),
    "glm4": _glm4_names,
    "granitemoe": _granite_names,
    "granitemoeshared": _granite_names,
    "granitemoehybrid": _granite_names,
}
