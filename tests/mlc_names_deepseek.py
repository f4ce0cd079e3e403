"""Parameter names and layouts that MLC LLM gives DeepSeek's models.

Part of the independent packer: shares no code with mlc_llm. Beside the two halves of `kv_b_proj`,
which alone are computed with, MLC LLM stores it whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from mlc_names_moe import fuse as fuse_experts
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = Mapping[str, Array]

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3")
_COPIED = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts"),
    *("num_experts_per_tok", "norm_topk_prob", "first_k_dense_replace", "routed_scaling_factor"),
    *("n_group", "topk_group", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"),
    *("qk_nope_head_dim", "v_head_dim", "rms_norm_eps", "vocab_size", "attention_bias"),
)


def fuse(config: Mapping[str, Any], weights: Weights) -> Iterator[tuple[str, Array]]:
    """Yield parameters under MLC names."""
    if config["model_type"] == "deepseek":
        for name, weight in fuse_experts(config, weights):
            yield name.replace("self_attn.c_attn", "self_attn.wqkv_pack"), weight
        return
    nope, heads = config["qk_nope_head_dim"], config["num_attention_heads"]
    rest = {}
    for name, weight in weights.items():
        prefix = name.removesuffix("kv_b_proj.weight")
        if prefix != name:
            yield name, weight
            by_head = np.split(weight, heads)
            yield prefix + "w_uk", np.stack([rows[:nope].T for rows in by_head])
            yield prefix + "w_uv", np.stack([rows[nope:] for rows in by_head])
        elif "self_attn.q_proj" in name:
            yield name, weight
        elif name.endswith("gate.e_score_correction_bias"):
            yield name.replace("gate.e_score", "e_score"), weight.astype(np.float32)
        else:
            rest[name] = weight
    yield from fuse_experts(config, rest)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of MLC LLM's class of the family, without the limits all have."""
    if config["model_type"] == "deepseek":
        return {name: config[name] for name in (*_COPIED, "rope_theta") if name in config}
    rope = dict(config["rope_parameters"])
    is_v3 = config["model_type"] == "deepseek_v3"
    method = "noaux_tc" if is_v3 else config["topk_method"]
    fields = {name: config[name] for name in _COPIED}
    base = rope.pop("rope_theta")
    return {
        **fields,
        "rope_theta": base,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid" if is_v3 else "softmax",
        "topk_method": method,
    }
