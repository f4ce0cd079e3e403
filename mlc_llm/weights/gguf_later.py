"""Architectures of GGUF files that came in 2024 and after: a table of data, see gguf_parts.py."""

from __future__ import annotations

from typing import Any

from mlc_llm.errors import UnsupportedModel
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_metadata import MetadataReader
from mlc_llm.weights.gguf_parts import (
    ATTENTION,
    BLOCK,
    COMMAND_R,
    DEEPSEEK_EXPERTS,
    DEEPSEEK_NUMBERS,
    ENDS,
    GATED,
    HALVES,
    HEAD_NORMS,
    LAYER_NORM,
    LLAMA,
    NO_RMS,
    NORMS,
    POST_NORMS,
    QWEN_EXPERTS,
    WINDOW,
    WITHOUT_FFN,
    Architecture,
    Number,
)

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_PATTERN = "attention.sliding_window_pattern"
_MAYBE_WINDOW: Number = ("attention.sliding_window", "count", 0)


def _set_layer_kinds(file: GGUFFile, config: dict[str, Any]) -> None:
    """Set which layers have the window, where the file says it: for each, or every how many not."""
    name = file.get("general.architecture", str)
    kinds = file.get(f"{name}.{_PATTERN}", (int, list))
    if isinstance(kinds, list):
        count = config["num_hidden_layers"]
        if len(kinds) < count or not all(isinstance(kind, bool) for kind in kinds):
            raise UnsupportedModel(
                f"{file.path}: {name}.{_PATTERN} is {kinds!r:.60}; it must say for each of "
                f"{count} layers whether it has the window"
            )
        config["layer_types"] = [_LOCAL if kind else _GLOBAL for kind in kinds[:count]]
    elif kinds:
        config["sliding_window_pattern"] = kinds


def _finish_olmo3(file: GGUFFile, config: dict[str, Any]) -> None:
    """Set the embeddings of layers with the window and of others, which alone are scaled."""
    _set_layer_kinds(file, config)
    base = config.pop("rope_theta")
    local = MetadataReader(file, "olmo2").real("rope.freq_base_swa", base)
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {
        _GLOBAL: {**scaling, "rope_theta": base},
        _LOCAL: {"rope_type": "default", "rope_theta": local},
    }


def _finish_granite_moe(file: GGUFFile, config: dict[str, Any]) -> None:
    del file
    if config["shared_intermediate_size"]:
        config["model_type"] = "granitemoeshared"
        config["architectures"] = ["GraniteMoeSharedForCausalLM"]


def _finish_seed(file: GGUFFile, config: dict[str, Any]) -> None:
    config["attention_out_bias"] = "blk.0.attn_output.bias" in file.tensors


def _finish_glm_moe(file: GGUFFile, config: dict[str, Any]) -> None:
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.tensors


# The norm between attention and feed-forward under another name.
_POST_NORM = "blk.{layer}.post_attention_norm"
_RENAMED_NORM = {
    _POST_NORM if name.endswith("ffn_norm") else name: other for name, other in WITHOUT_FFN.items()
}
_GLM = {
    **ENDS,
    **ATTENTION,
    **NORMS,
    "blk.{layer}.ffn_up": BLOCK + "mlp.gate_up_proj",
    "blk.{layer}.ffn_down": BLOCK + "mlp.down_proj",
}
_OLMO = {**ENDS, **ATTENTION, **HEAD_NORMS, **POST_NORMS, **GATED}
_GRANITE: dict[str, Number] = {
    "attention_multiplier": ("attention.scale", "real", None),
    "embedding_multiplier": ("embedding_scale", "real", 1.0),
    "logits_scaling": ("logit_scale", "real", 1.0),
    "residual_multiplier": ("residual_scale", "real", 1.0),
}
LATER = {
    "granite": Architecture("granite", "GraniteForCausalLM", LLAMA, HALVES, numbers=_GRANITE),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            **WITHOUT_FFN,
            **QWEN_EXPERTS,
            "blk.{layer}.ffn_gate_inp": BLOCK + "block_sparse_moe.router.layer",
            "blk.{layer}.ffn_gate_shexp": BLOCK + "mlp.shared_expert.gate_proj",
            "blk.{layer}.ffn_up_shexp": BLOCK + "mlp.shared_expert.up_proj",
            "blk.{layer}.ffn_down_shexp": BLOCK + "mlp.shared_expert.down_proj",
        },
        HALVES,
        numbers={
            **_GRANITE,
            "num_local_experts": ("expert_count", "count", None),
            "num_experts_per_tok": ("expert_used_count", "count", None),
            "shared_intermediate_size": ("expert_shared_feed_forward_length", "count", 0),
        },
        constants={"has_split_experts": True},
        finish=_finish_granite_moe,
    ),
    # Every fourth layer is without positions, which these files do not say.
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA, HALVES),
    "cohere2": Architecture(
        "cohere2",
        "Cohere2ForCausalLM",
        COMMAND_R,
        fields=NO_RMS,
        numbers={
            "layer_norm_eps": LAYER_NORM,
            "logit_scale": ("logit_scale", "real", None),
            "sliding_window": WINDOW,
        },
        with_window=True,
        finish=_set_layer_kinds,
    ),
    "exaone4": Architecture(
        "exaone4",
        "Exaone4ForCausalLM",
        _OLMO,
        numbers={"sliding_window": _MAYBE_WINDOW},
        with_window=True,
        finish=_set_layer_kinds,
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        {
            **_GLM,
            _POST_NORM: BLOCK + "post_self_attn_layernorm",
            "blk.{layer}.post_ffw_norm": BLOCK + "post_mlp_layernorm",
        },
        has_partial_rotary=True,
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**_RENAMED_NORM, **HEAD_NORMS, **GATED, **DEEPSEEK_EXPERTS},
        exact={"blk.{layer}.exp_probs_b.bias": BLOCK + "mlp.gate.e_score_correction_bias"},
        numbers={
            **DEEPSEEK_NUMBERS,
            "n_group": ("expert_group_count", "count", 1),
            "topk_group": ("expert_group_used_count", "count", 1),
            "norm_topk_prob": ("expert_weights_norm", "flag", True),
        },
        has_partial_rotary=True,
        finish=_finish_glm_moe,
    ),
    "seed_oss": Architecture(
        "seed_oss", "SeedOssForCausalLM", {**_RENAMED_NORM, **GATED}, finish=_finish_seed
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", LLAMA),
    # The base of its rotary embedding is stored as stretched.
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        {
            **LLAMA,
            "blk.{layer}.attn_q_norm": BLOCK + "self_attn.query_layernorm",
            "blk.{layer}.attn_k_norm": BLOCK + "self_attn.key_layernorm",
        },
    ),
    "arcee": Architecture(
        "arcee",
        "ArceeForCausalLM",
        {name: other for name, other in LLAMA.items() if not name.endswith("ffn_gate")},
        HALVES,
        constants={"hidden_act": "relu2"},
    ),
}
# OLMo 3 is stored as olmo2, and told apart by its window.
OLMO3 = Architecture(
    "olmo3",
    "Olmo3ForCausalLM",
    _OLMO,
    numbers={"sliding_window": WINDOW},
    with_window=True,
    finish=_finish_olmo3,
)
# GLM-4-9B as transformers has it is stored as chatglm, and told apart by q, k and v of its own.
GLM = Architecture("glm", "GlmForCausalLM", _GLM, has_partial_rotary=True)
