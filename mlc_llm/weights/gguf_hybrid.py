"""Qwen3.5 in GGUF files: layers of linear attention among layers of full attention."""

from __future__ import annotations

from typing import Any

from mlc_llm.errors import CorruptFile
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_parts import (
    BLOCK,
    HEAD_NORMS,
    LLAMA,
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
# Value heads lie in another order, and 1 was added to all norms but that of linear attention.
CHANGES: dict[str, Change] = {
    "blk.{layer}.attn_qkv": "tiled_last_rows",
    "blk.{layer}.attn_gate": "tiled_rows",
    "blk.{layer}.ssm_beta": "tiled_rows",
    "blk.{layer}.ssm_alpha": "tiled_rows",
    "blk.{layer}.ssm_conv1d": "tiled_convolution",
    "blk.{layer}.ssm_out": "tiled_columns",
    "blk.{layer}.ssm_a": "tiled_decay",
    "blk.{layer}.ssm_dt.bias": "tiled_rows",
    **plus_one("output_norm", "blk.{layer}.attn_norm", _POST_NORM, *HEAD_NORMS),
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


QWEN35 = Architecture(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    {
        **{name: other for name, other in LLAMA.items() if not name.endswith("ffn_norm")},
        **HEAD_NORMS,
        **LINEAR_ATTENTION,
        _POST_NORM: BLOCK + "post_attention_layernorm",
    },
    CHANGES,
    exact=DECAYS,
    numbers=NUMBERS,
    has_partial_rotary=True,
    finish=finish_hybrid,
)
