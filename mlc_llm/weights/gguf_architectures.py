"""What the architectures of GGUF files are in Hugging Face's words: a table of data.

To add one, write an Architecture: its tensor names, which of them llama.cpp's converter changes,
and the fields of `config.json`. Files are read by gguf_config.py and gguf.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# How the converter of llama.cpp changed a tensor.
# q_halves, k_halves: the two rotary halves of each head's rows are interleaved.
# plus_one: 1 was added. transposed: inputs and outputs are exchanged.
# flat: an extent of 1 was dropped in front. qkv_groups: q, k and v of all heads were sorted apart.
Change = Literal["q_halves", "k_halves", "plus_one", "transposed", "flat", "qkv_groups"]
# A number of the metadata: key, kind, and the value where it is not there (None: it must be).
Number = tuple[str, Literal["count", "real", "flag"], Any]


@dataclass(frozen=True)
class Architecture:
    """One architecture. `{layer}` and `{expert}` in names stand for numbers.

    tensors: GGUF name -> Hugging Face name, both without `.weight` or `.bias`; stacked experts have
    `{expert}` in the latter. changes: GGUF name -> how its values differ. fields: names that
    `config.json` has for what every decoder has, where they are not Llama's; None leaves one out.
    numbers and constants: further fields. has_partial_rotary: whether fewer values than a head has
    may be rotated, as `partial_rotary_factor`; with_window: whether a sliding window is known.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, str]
    changes: Mapping[str, Change] = field(default_factory=dict)
    fields: Mapping[str, str | None] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    has_partial_rotary: bool = False
    with_window: bool = False


_BLOCK = "model.layers.{layer}."
_ATTENTION = {
    "blk.{layer}.attn_q": _BLOCK + "self_attn.q_proj",
    "blk.{layer}.attn_k": _BLOCK + "self_attn.k_proj",
    "blk.{layer}.attn_v": _BLOCK + "self_attn.v_proj",
    "blk.{layer}.attn_output": _BLOCK + "self_attn.o_proj",
}
_NORMS = {
    "blk.{layer}.attn_norm": _BLOCK + "input_layernorm",
    "blk.{layer}.ffn_norm": _BLOCK + "post_attention_layernorm",
}
_ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GATED = {
    "blk.{layer}.ffn_gate": _BLOCK + "mlp.gate_proj",
    "blk.{layer}.ffn_up": _BLOCK + "mlp.up_proj",
    "blk.{layer}.ffn_down": _BLOCK + "mlp.down_proj",
}
_WITHOUT_FFN = {**_ENDS, **_ATTENTION, **_NORMS}
_LLAMA = {**_WITHOUT_FFN, **_GATED}
_TIED = {name: other for name, other in _LLAMA.items() if name != "output"}
_HEAD_NORMS = {
    "blk.{layer}.attn_q_norm": _BLOCK + "self_attn.q_norm",
    "blk.{layer}.attn_k_norm": _BLOCK + "self_attn.k_norm",
}
_POST_NORMS = {
    "blk.{layer}.post_attention_norm": _BLOCK + "post_attention_layernorm",
    "blk.{layer}.post_ffw_norm": _BLOCK + "post_feedforward_layernorm",
}
_HALVES: dict[str, Change] = {
    "blk.{layer}.attn_q": "q_halves",
    "blk.{layer}.attn_k": "k_halves",
}
_MIXTRAL_EXPERTS = {
    "blk.{layer}.ffn_gate_inp": _BLOCK + "block_sparse_moe.gate",
    "blk.{layer}.ffn_gate_exps": _BLOCK + "block_sparse_moe.experts.{expert}.w1",
    "blk.{layer}.ffn_down_exps": _BLOCK + "block_sparse_moe.experts.{expert}.w2",
    "blk.{layer}.ffn_up_exps": _BLOCK + "block_sparse_moe.experts.{expert}.w3",
}
_QWEN_EXPERTS = {
    "blk.{layer}.ffn_gate_inp": _BLOCK + "mlp.gate",
    "blk.{layer}.ffn_gate_exps": _BLOCK + "mlp.experts.{expert}.gate_proj",
    "blk.{layer}.ffn_down_exps": _BLOCK + "mlp.experts.{expert}.down_proj",
    "blk.{layer}.ffn_up_exps": _BLOCK + "mlp.experts.{expert}.up_proj",
}
_SHARED_EXPERT = {
    "blk.{layer}.ffn_gate_inp_shexp": _BLOCK + "mlp.shared_expert_gate",
    "blk.{layer}.ffn_gate_shexp": _BLOCK + "mlp.shared_expert.gate_proj",
    "blk.{layer}.ffn_up_shexp": _BLOCK + "mlp.shared_expert.up_proj",
    "blk.{layer}.ffn_down_shexp": _BLOCK + "mlp.shared_expert.down_proj",
}
_DEEPSEEK_EXPERTS = {
    name: other.replace("shared_expert.", "shared_experts.")
    for name, other in {**_QWEN_EXPERTS, **_SHARED_EXPERT}.items()
    if not other.endswith("shared_expert_gate")
}
_GPT2_BLOCK = "transformer.h.{layer}."

_LAYER_NORM: Number = ("attention.layer_norm_epsilon", "real", None)
_NO_RMS: dict[str, str | None] = {"rms_norm_eps": None}
_EXPERTS: dict[str, Number] = {
    "num_experts": ("expert_count", "count", None),
    "num_experts_per_tok": ("expert_used_count", "count", None),
    "moe_intermediate_size": ("expert_feed_forward_length", "count", None),
}
_GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
_WINDOW: Number = ("attention.sliding_window", "count", None)


def _plus_one(*names: str) -> dict[str, Change]:
    return {name: "plus_one" for name in names}


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, _HALVES),
    "qwen": Architecture(
        "qwen",
        "QWenLMHeadModel",
        {
            "token_embd": "transformer.wte",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{layer}.attn_norm": _GPT2_BLOCK + "ln_1",
            "blk.{layer}.attn_qkv": _GPT2_BLOCK + "attn.c_attn",
            "blk.{layer}.attn_output": _GPT2_BLOCK + "attn.c_proj",
            "blk.{layer}.ffn_norm": _GPT2_BLOCK + "ln_2",
            "blk.{layer}.ffn_up": _GPT2_BLOCK + "mlp.w1",
            "blk.{layer}.ffn_gate": _GPT2_BLOCK + "mlp.w2",
            "blk.{layer}.ffn_down": _GPT2_BLOCK + "mlp.c_proj",
        },
        fields={
            "num_key_value_heads": None,
            "attention_bias": None,
            "mlp_bias": None,
            "rms_norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
        },
        # What it does beyond the trained length is not in these files.
        constants={"use_dynamic_ntk": False, "use_logn_attn": False},
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_WITHOUT_FFN, **_QWEN_EXPERTS, **_SHARED_EXPERT},
        {"blk.{layer}.ffn_gate_inp_shexp": "flat"},
        numbers={
            **_EXPERTS,
            "shared_expert_intermediate_size": ("expert_shared_feed_forward_length", "count", None),
        },
        constants={"decoder_sparse_step": 1, "norm_topk_prob": False},
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_HEAD_NORMS}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_WITHOUT_FFN, **_HEAD_NORMS, **_QWEN_EXPERTS},
        numbers=_EXPERTS,
        constants={"decoder_sparse_step": 1, "norm_topk_prob": True},
    ),
    "gemma": Architecture(
        "gemma",
        "GemmaForCausalLM",
        _TIED,
        _plus_one("output_norm", "blk.{layer}.attn_norm", "blk.{layer}.ffn_norm"),
        constants={"hidden_act": "gelu_pytorch_tanh", **_GEMMA},
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **_TIED,
            **_POST_NORMS,
            "blk.{layer}.ffn_norm": _BLOCK + "pre_feedforward_layernorm",
        },
        _plus_one("output_norm", "blk.{layer}.attn_norm", "blk.{layer}.ffn_norm", *_POST_NORMS),
        numbers={
            "attn_logit_softcapping": ("attn_logit_softcapping", "real", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", "real", 30.0),
            "sliding_window": _WINDOW,
        },
        constants={"hidden_act": "gelu_pytorch_tanh", **_GEMMA},
        with_window=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **_LLAMA,
            **_POST_NORMS,
            **_HEAD_NORMS,
            "blk.{layer}.ffn_norm": _BLOCK + "pre_feedforward_layernorm",
        },
        _plus_one(
            *("output_norm", "blk.{layer}.attn_norm", "blk.{layer}.ffn_norm"),
            *_POST_NORMS,
            *_HEAD_NORMS,
        ),
        numbers={
            "sliding_window": _WINDOW,
            "rope_theta": ("rope.freq_base", "real", 1000000.0),
            "rope_local_base_freq": ("rope.freq_base_swa", "real", 10000.0),
        },
        constants={"hidden_act": "gelu_pytorch_tanh", "sliding_window_pattern": 6, **_GEMMA},
        with_window=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            **_ENDS,
            **_NORMS,
            "blk.{layer}.attn_qkv": _BLOCK + "self_attn.qkv_proj",
            "blk.{layer}.attn_output": _BLOCK + "self_attn.o_proj",
            "blk.{layer}.ffn_up": _BLOCK + "mlp.gate_up_proj",
            "blk.{layer}.ffn_down": _BLOCK + "mlp.down_proj",
        },
        numbers={
            "sliding_window": ("attention.sliding_window", "count", 0),
            "original_max_position_embeddings": (
                *("rope.scaling.original_context_length", "count"),
                0,
            ),
        },
        has_partial_rotary=True,
        with_window=True,
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        _LLAMA,
        fields=_NO_RMS,
        numbers={
            "layer_norm_eps": _LAYER_NORM,
            "use_parallel_residual": ("use_parallel_residual", "flag", False),
        },
        has_partial_rotary=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {
            **_ENDS,
            **_ATTENTION,
            **_NORMS,
            "blk.{layer}.ffn_up": _BLOCK + "mlp.c_fc",
            "blk.{layer}.ffn_down": _BLOCK + "mlp.c_proj",
        },
        fields=_NO_RMS,
        numbers={"norm_epsilon": _LAYER_NORM},
        constants={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "deepseek": Architecture(
        "deepseek",
        "DeepseekForCausalLM",
        {**_LLAMA, **_DEEPSEEK_EXPERTS},
        _HALVES,
        numbers={
            "n_routed_experts": ("expert_count", "count", None),
            "num_experts_per_tok": ("expert_used_count", "count", None),
            "moe_intermediate_size": ("expert_feed_forward_length", "count", None),
            "n_shared_experts": ("expert_shared_count", "count", 0),
            "first_k_dense_replace": ("leading_dense_block_count", "count", 0),
            "routed_scaling_factor": ("expert_weights_scale", "real", 1.0),
        },
        constants={"moe_layer_freq": 1, "norm_topk_prob": False},
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{layer}.attn_norm": _GPT2_BLOCK + "ln_1",
            "blk.{layer}.attn_qkv": _GPT2_BLOCK + "attn.c_attn",
            "blk.{layer}.attn_output": _GPT2_BLOCK + "attn.c_proj",
            "blk.{layer}.ffn_norm": _GPT2_BLOCK + "ln_2",
            "blk.{layer}.ffn_up": _GPT2_BLOCK + "mlp.c_fc",
            "blk.{layer}.ffn_down": _GPT2_BLOCK + "mlp.c_proj",
        },
        {
            "blk.{layer}.attn_qkv": "transposed",
            "blk.{layer}.attn_output": "transposed",
            "blk.{layer}.ffn_up": "transposed",
            "blk.{layer}.ffn_down": "transposed",
        },
        fields={
            "hidden_act": None,
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "num_key_value_heads": None,
            "rms_norm_eps": None,
            "rope_theta": None,
            "rope_scaling": None,
            "attention_bias": None,
            "mlp_bias": None,
        },
        numbers={"layer_norm_epsilon": _LAYER_NORM},
        constants={"activation_function": "gelu_new"},
    ),
    "gptneox": Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
            "blk.{layer}.attn_norm": "gpt_neox.layers.{layer}.input_layernorm",
            "blk.{layer}.attn_qkv": "gpt_neox.layers.{layer}.attention.query_key_value",
            "blk.{layer}.attn_output": "gpt_neox.layers.{layer}.attention.dense",
            "blk.{layer}.ffn_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
            "blk.{layer}.ffn_up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
            "blk.{layer}.ffn_down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
        },
        {"blk.{layer}.attn_qkv": "qkv_groups"},
        fields={"rms_norm_eps": None, "rope_theta": "rotary_emb_base"},
        numbers={
            "layer_norm_eps": _LAYER_NORM,
            "use_parallel_residual": ("use_parallel_residual", "flag", True),
        },
        constants={"hidden_act": "gelu"},
        has_partial_rotary=True,
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        {**_ENDS, **_ATTENTION, **_HEAD_NORMS, **_POST_NORMS, **_GATED},
    ),
}
# Mixtral is stored as llama, and told apart by its experts; Mistral by its window.
MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    {**_WITHOUT_FFN, **_MIXTRAL_EXPERTS},
    _HALVES,
    numbers={
        "num_local_experts": ("expert_count", "count", None),
        "num_experts_per_tok": ("expert_used_count", "count", None),
        "sliding_window": ("attention.sliding_window", "count", 0),
    },
    with_window=True,
)
