"""Qwen3.5 and Qwen3-Next in GGUF files: linear attention among layers of full attention."""

from __future__ import annotations

from typing import Any

from mlc_llm.errors import CorruptFile
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_parts import (
    BLOCK,
    EXPERTS,
    HEAD_NORMS,
    LLAMA,
    QWEN_EXPERTS,
    SHARED_EXPERT,
    WITHOUT_FFN,
    Architecture,
    Change,
    Number,
    plus_one,
)

_LINEAR = BLOCK + "linear_attn."
_POST_NORM = "blk.{layer}.post_attention_norm"
LINEAR_ATTENTION = {
    "blk.{layer}.attn_qkv": _LINEAR + "in_proj_qkv",
    "blk.{layer}.attn_gate": _LINEAR + "in_proj_z",
    "blk.{layer}.ssm_beta": _LINEAR + "in_proj_b",
    "blk.{layer}.ssm_alpha": _LINEAR + "in_proj_a",
    "blk.{layer}.ssm_conv1d": _LINEAR + "conv1d",
    "blk.{layer}.ssm_norm": _LINEAR + "norm",
    "blk.{layer}.ssm_out": _LINEAR + "out_proj",
}
DECAYS = {
    "blk.{layer}.ssm_a": _LINEAR + "A_log",
    "blk.{layer}.ssm_dt.bias": _LINEAR + "dt_bias",
}
# 1 was added to all norms but that of linear attention.
_NORM_CHANGES = plus_one("output_norm", "blk.{layer}.attn_norm", _POST_NORM, *HEAD_NORMS)
# Value heads lie in another order.
CHANGES: dict[str, Change] = {
    "blk.{layer}.attn_qkv": "tiled_last_rows",
    "blk.{layer}.attn_gate": "tiled_rows",
    "blk.{layer}.ssm_beta": "tiled_rows",
    "blk.{layer}.ssm_alpha": "tiled_rows",
    "blk.{layer}.ssm_conv1d": "tiled_convolution",
    "blk.{layer}.ssm_out": "tiled_columns",
    "blk.{layer}.ssm_a": "tiled_decay",
    "blk.{layer}.ssm_dt.bias": "tiled_rows",
    **_NORM_CHANGES,
}
NUMBERS: dict[str, Number] = {
    "linear_conv_kernel_dim": ("ssm.conv_kernel", "count", None),
    "linear_key_head_dim": ("ssm.state_size", "count", None),
    "linear_num_key_heads": ("ssm.group_count", "count", None),
    "linear_num_value_heads": ("ssm.time_step_rank", "count", None),
    # Of all value heads; see finish_hybrid.
    "linear_value_head_dim": ("ssm.inner_size", "count", None),
    "full_attention_interval": ("full_attention_interval", "count", 4),
}


def finish_hybrid(file: GGUFFile, config: dict[str, Any]) -> None:
    """Set sizes of heads and the rotary embedding as `config.json` has them. Raises CorruptFile."""
    width, heads = config["linear_value_head_dim"], config["linear_num_value_heads"]
    groups = config["linear_num_key_heads"]
    if width % heads or heads % groups:
        raise CorruptFile(
            f"{file.path} has linear attention of {groups} key heads, {heads} value heads and "
            f"{width} values, which cannot be shared evenly; fetch it again"
        )
    config["linear_value_head_dim"] = width // heads
    config["rope_parameters"] = {
        "rope_type": "default",
        **(config.pop("rope_scaling") or {}),
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": config.pop("partial_rotary_factor"),
    }
    # The first layers have no query of their own.
    config["attention_bias"] = any(name.endswith(".attn_q.bias") for name in file.tensors)


def _finish_next(file: GGUFFile, config: dict[str, Any]) -> None:
    """Also say whether inputs of linear attention are apart, as newer converters leave them."""
    finish_hybrid(file, config)
    config["has_split_qkvz"] = any(name.endswith(".attn_gate.weight") for name in file.tensors)


_BOTH = {**HEAD_NORMS, **LINEAR_ATTENTION, _POST_NORM: BLOCK + "post_attention_layernorm"}
_MOE = {
    **{name: other for name, other in WITHOUT_FFN.items() if not name.endswith("ffn_norm")},
    **_BOTH,
    **QWEN_EXPERTS,
    **SHARED_EXPERT,
}
_MOE_NUMBERS: dict[str, Number] = {
    **NUMBERS,
    **EXPERTS,
    "shared_expert_intermediate_size": ("expert_shared_feed_forward_length", "count", None),
}
_SHARED_GATE: dict[str, Change] = {"blk.{layer}.ffn_gate_inp_shexp": "flat"}
_MOE_CONSTANTS = {"decoder_sparse_step": 1, "norm_topk_prob": True}
QWEN35 = Architecture(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    {**{name: other for name, other in LLAMA.items() if not name.endswith("ffn_norm")}, **_BOTH},
    CHANGES,
    exact=DECAYS,
    numbers=NUMBERS,
    has_partial_rotary=True,
    finish=finish_hybrid,
)
QWEN35MOE = Architecture(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    _MOE,
    {**CHANGES, **_SHARED_GATE},
    exact=DECAYS,
    numbers=_MOE_NUMBERS,
    constants=_MOE_CONSTANTS,
    has_partial_rotary=True,
    finish=finish_hybrid,
)
# Value heads lie as on Hugging Face.
QWEN3NEXT = Architecture(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    {
        **{name: other for name, other in _MOE.items() if not name.endswith(("beta", "alpha"))},
        "blk.{layer}.ssm_in": _LINEAR + "in_proj_qkvz",
        "blk.{layer}.ssm_ba": _LINEAR + "in_proj_ba",
    },
    {
        **_NORM_CHANGES,
        **_SHARED_GATE,
        "blk.{layer}.ssm_a": "decay",
        "blk.{layer}.ssm_conv1d": "convolution",
    },
    exact=DECAYS,
    numbers=_MOE_NUMBERS,
    constants=_MOE_CONSTANTS,
    has_partial_rotary=True,
    finish=_finish_next,
)
