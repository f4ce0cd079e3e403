"""Parameter names and layouts that MLC LLM gives the dense relatives of Llama.

Part of the independent packer: shares no code with mlc_llm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

# Family -> what its checkpoints call a part of a name, and what MLC LLM calls it. First the usual.
_QKV = ("self_attn.q_proj", "self_attn.qkv_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.gate_up_proj")
_USUAL = (_QKV, _GATE_UP)
_PACKED = (("self_attn.q_proj", "self_attn.wqkv_pack"), _GATE_UP)
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "qwen3": (("self_attn.q_proj", "self_attn.c_attn"), _GATE_UP),
    "gemma": _USUAL,
    "gemma2": _USUAL,
    "gemma3": (_GATE_UP,),
    "gemma3_text": (("model.", "language_model.model."), _GATE_UP),
    "phi3": (
        ("model.embed_tokens", "transformer.embd"),
        ("model.layers", "transformer.h"),
        ("model.norm", "transformer.norm"),
        ("input_layernorm", "ln"),
        ("self_attn.o_proj", "mixer.out_proj"),
        ("self_attn", "mixer"),
    ),
    "mistral3": (("language_model.", ""), *_USUAL),
    "ministral3": _USUAL,
    "olmo": _USUAL,
    "olmo2": _USUAL,
    "stablelm": _USUAL,
    "internlm": _PACKED,
    "internlm2": (("feed_forward.w1", "feed_forward.gate_up_proj"),),
    "baichuan": (_GATE_UP,),
    "orion": _USUAL,
    "minicpm": _PACKED,
    "nemotron": (_QKV,),
    "cohere": (_QKV, ("self_attn.o_proj", "self_attn.out_proj")),
    "starcoder2": _PACKED,
    "qwen": (("mlp.w1", "mlp.gate_up_proj"),),
    "chatglm": (("embedding.word_embeddings", "embedding"),),
}
MODEL_TYPES = tuple(_NAMES)
# Tensors that are joined with another one; where the family's names keep them apart they stay.
_JOINED = {
    "self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_proj": ("mlp.up_proj",),
    "feed_forward.w1": ("feed_forward.w3",),
    "mlp.w1": ("mlp.w2",),
}


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under MLC names."""
    kind = config["model_type"]
    names = dict(_NAMES[kind])
    first = {name: others for name, others in _JOINED.items() if name in names}
    later = {other for others in first.values() for other in others}
    for name, weight in weights.items():
        if "inv_freq" in name or name.startswith(("vision_tower.", "multi_modal_projector.")):
            continue
        if any(f".{other}." in name for other in later):
            continue
        if ".mlp.experts." in name:
            if ".experts.0." in name:
                yield from _stacked_experts(name, weights)
            continue
        if "_layernorm.norms." in name:  # StableLM's largest; MLC LLM has no name for them
            if ".norms.0." in name:
                yield from _stacked_norms(name, weights)
            continue
        for start, others in first.items():
            if f".{start}." in name:
                rest = [weights[name.replace(start, other)] for other in others]
                weight = np.concatenate([weight, *rest])
        yield _rename(name, names), _value(config, name, weight)


def _stacked_experts(first: str, weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield MiniCPM's experts, of the tensors of expert 0: [w1; w3] as e1_e3, w2 as e2."""
    at, _, part = first.partition("experts.0.")
    count = sum(name.startswith(f"{at}experts.") and name.endswith(part) for name in weights)
    rows = {
        kind: np.stack([weights[f"{at}experts.{e}.{kind}.weight"] for e in range(count)])
        for kind in ("w1", "w2", "w3")
    }
    if part == "w1.weight":
        yield f"{at}e1_e3.weight", np.concatenate([rows["w1"], rows["w3"]], axis=1)
    elif part == "w2.weight":
        yield f"{at}e2.weight", rows["w2"]


def _stacked_norms(first: str, weights: Weights) -> Iterator[tuple[str, Array]]:
    start = first.removesuffix("layernorm.norms.0.weight")
    count = sum(name.startswith(f"{start}layernorm.norms.") for name in weights)
    rows = [weights[first.replace(".0.weight", f".{head}.weight")] for head in range(count)]
    yield f"{start}norm.weight", np.stack(rows)


def _rename(name: str, names: Mapping[str, str]) -> str:
    for theirs, mlc in names.items():
        name = name.replace(theirs, mlc, 1)
    return name


def _value(config: Mapping[str, Any], name: str, weight: Array) -> Array:
    kind = config["model_type"]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return weight + np.asarray(1, weight.dtype)
    if kind == "baichuan" and name == "lm_head.weight" and "z_loss_weight" in config:
        return weight / np.linalg.norm(weight, axis=1, keepdims=True)
    if kind == "internlm2" and ".wqkv." in name:
        kv_heads = config["num_key_value_heads"]
        group = config["num_attention_heads"] // kv_heads
        size = len(weight) // (kv_heads * (group + 2))
        heads = np.arange(len(weight)).reshape(kv_heads, group + 2, size)
        order = [heads[:, :group], heads[:, group], heads[:, group + 1]]
        return weight[np.concatenate([part.reshape(-1) for part in order])]
    return weight


# Fields of MLC LLM's configuration classes, as far as it has them under the published name.
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "norm_epsilon"),
    *("norm_eps", "hidden_act", "hidden_activation", "attention_bias", "bias", "use_bias"),
    *("tie_word_embeddings", "use_qkv_bias", "attn_logit_softcapping", "final_logit_softcapping"),
    *("query_pre_attn_scalar", "sliding_window", "clip_qkv", "logit_scale", "use_qk_norm"),
    *("qk_layernorm", "use_parallel_residual", "num_experts", "num_experts_per_tok"),
    *("scale_emb", "scale_depth", "dim_model_base", "max_position_embeddings", "kv_channels"),
    *("original_max_position_embeddings", "num_layers", "ffn_hidden_size", "layernorm_epsilon"),
    *("layer_norm_epsilon", "rotary_emb_base", "scale_attn_weights", "no_bias"),
    *("multi_query_group_num", "add_qkv_bias", "add_bias_linear", "model_type"),
)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of MLC LLM's class of the family, without the limits all have."""
    if "text_config" in config:
        return {"text_config": model_config(config["text_config"]), "vocab_size": 131}
    fields = {name: config[name] for name in _FIELDS if name in config}
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = rope.get("full_attention", rope)
    base = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    share = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if share is not None:
        fields["partial_rotary_factor"] = share
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return {**fields, "position_embedding_base": base, "rope_scaling": rope if is_scaled else None}
