"""DeepSeek V2 and V3 in GGUF files: one architecture, set apart from others by latent attention.

Knows both forms: keys and values of the latent in one tensor, and (newer) each in its own, with
sizes of the heads they stand for under keys that end in `_mla`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mlc_llm.errors import CorruptFile
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_parts import (
    BLOCK,
    DEEPSEEK_EXPERTS,
    DEEPSEEK_NUMBERS,
    ENDS,
    GATED,
    NORMS,
    Architecture,
)

_SIGMOID = 2  # among llama.cpp's numbers of functions that score experts
DEEPSEEK2 = Architecture(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    {
        **ENDS,
        **NORMS,
        **GATED,
        **DEEPSEEK_EXPERTS,
        "blk.{layer}.exp_probs_b": BLOCK + "mlp.gate.e_score_correction",
        "blk.{layer}.attn_q": BLOCK + "self_attn.q_proj",
        "blk.{layer}.attn_q_a": BLOCK + "self_attn.q_a_proj",
        "blk.{layer}.attn_q_a_norm": BLOCK + "self_attn.q_a_layernorm",
        "blk.{layer}.attn_q_b": BLOCK + "self_attn.q_b_proj",
        "blk.{layer}.attn_kv_a_mqa": BLOCK + "self_attn.kv_a_proj_with_mqa",
        "blk.{layer}.attn_kv_a_norm": BLOCK + "self_attn.kv_a_layernorm",
        "blk.{layer}.attn_kv_b": BLOCK + "self_attn.kv_b_proj",
        "blk.{layer}.attn_k_b": BLOCK + "self_attn.k_b_proj",
        "blk.{layer}.attn_v_b": BLOCK + "self_attn.v_b_proj",
        "blk.{layer}.attn_output": BLOCK + "self_attn.o_proj",
    },
    numbers={
        **DEEPSEEK_NUMBERS,
        "kv_lora_rank": ("attention.kv_lora_rank", "count", None),
        "q_lora_rank": ("attention.q_lora_rank", "count", 0),
        "qk_rope_head_dim": ("rope.dimension_count", "count", None),
        "qk_head_dim": ("attention.key_length_mla", "count", 0),
        "v_head_dim": ("attention.value_length_mla", "count", 0),
        "n_group": ("expert_group_count", "count", 1),
        "topk_group": ("expert_group_used_count", "count", 1),
        "norm_topk_prob": ("expert_weights_norm", "flag", False),
        "mscale_all_dim": ("rope.scaling.yarn_log_multiplier", "real", 0.0),
    },
    constants={"moe_layer_freq": 1, "is_from_gguf": True},
    is_latent=True,
)
DEEPSEEK3 = dataclasses.replace(
    DEEPSEEK2, model_type="deepseek_v3", class_name="DeepseekV3ForCausalLM"
)


def is_deepseek3(file: GGUFFile) -> bool:
    """Return whether a file has the later of both generations: it scores experts by a sigmoid."""
    return bool(file.get("deepseek2.expert_gating_func", int, 0) == _SIGMOID)


def add_latent_fields(file: GGUFFile, config: dict[str, Any], key_len: int) -> None:
    """Turn the numbers of latent attention into those of `config.json`.

    key_len: `attention.key_length`, in older files that of a head. Raises CorruptFile.
    """
    is_split = "blk.0.attn_k_b.weight" in file.tensors
    query_dim, rope_dim = config.pop("qk_head_dim"), config["qk_rope_head_dim"]
    if not is_split:
        query_dim = query_dim or key_len
        value_len = file.get("deepseek2.attention.value_length", int, key_len)
        config["v_head_dim"] = config["v_head_dim"] or value_len
    if query_dim <= rope_dim or config["v_head_dim"] <= 0:
        raise CorruptFile(
            f"{file.path} has heads of {query_dim} values, {rope_dim} of them rotated, and of "
            f"{config['v_head_dim']} for values (deepseek2.attention.key_length_mla and "
            "value_length_mla); fetch it again"
        )
    config.pop("head_dim", None)
    config.update(
        qk_nope_head_dim=query_dim - rope_dim,
        q_lora_rank=config["q_lora_rank"] or None,
        num_key_value_heads=config["num_attention_heads"],
        has_split_kv_b=is_split,
        n_group=config["n_group"] or 1,
        topk_group=config["topk_group"] or 1,
    )
    if config["model_type"] == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    scale, scaling = config.pop("mscale_all_dim"), config["rope_scaling"] or {}
    if scale and scaling.get("type") == "yarn":
        # A tenth of it is stored, as float32; published models have the same for both.
        scaling["mscale"] = scaling["mscale_all_dim"] = float(f"{10 * scale:.6g}")
