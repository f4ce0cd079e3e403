"""What tables of GGUF architectures are made of: their type, and names that many have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlc_llm.weights.gguf_file import GGUFFile

# How the converter of llama.cpp changed a tensor; gguf_changes.py undoes it.
# q_halves, k_halves: the two rotary halves of each head's rows are interleaved.
# qkv_groups: q, k and v of all heads were sorted apart. plus_one: 1 was added to weights.
# transposed: inputs and outputs are exchanged. flat, flat_row: an extent of 1 was dropped in front,
# or all of them but the last.
# decay: -exp() was taken. convolution: an extent of 1 was dropped in the middle.
# tiled_...: value heads of linear attention are in another order, by rows, by the last of the rows
# or by columns, or besides one of the two before.
Change = Literal[
    "q_halves",
    "k_halves",
    "qkv_groups",
    "plus_one",
    "transposed",
    "flat",
    "flat_row",
    "decay",
    "convolution",
    "tiled_rows",
    "tiled_last_rows",
    "tiled_columns",
    "tiled_decay",
    "tiled_convolution",
]
# A number of the metadata: key, kind, and the value where it is not there (None: it must be).
Number = tuple[str, Literal["count", "real", "flag"], Any]


@dataclass(frozen=True)
class Architecture:
    """One architecture. `{layer}` and `{expert}` in names stand for numbers.

    tensors: GGUF name -> Hugging Face name, both without `.weight` or `.bias`; stacked experts have
    `{expert}` in the latter, other stacked tensors the letters of their parts. exact: the same with
    these endings, where they are not alike. changes: GGUF name -> how its values differ. fields:
    names that `config.json` has for what every decoder has, where they are not Llama's; None leaves
    one out. numbers and constants: further fields. has_partial_rotary: whether fewer values than a
    head has may be rotated, as `partial_rotary_factor`; with_window: whether a sliding window is
    known; is_latent: whether keys and values are of a latent, so that lengths are not those of
    heads; is_recurrent: whether there are neither. finish: changes what else `config.json` has
    otherwise; it may raise UnsupportedModel.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, str]
    exact: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    changes: Mapping[str, Change] = field(default_factory=dict)
    fields: Mapping[str, str | None] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    has_partial_rotary: bool = False
    with_window: bool = False
    is_latent: bool = False
    is_recurrent: bool = False
    finish: Callable[[GGUFFile, dict[str, Any]], None] | None = None


BLOCK = "model.layers.{layer}."
ATTENTION = {
    "blk.{layer}.attn_q": BLOCK + "self_attn.q_proj",
    "blk.{layer}.attn_k": BLOCK + "self_attn.k_proj",
    "blk.{layer}.attn_v": BLOCK + "self_attn.v_proj",
    "blk.{layer}.attn_output": BLOCK + "self_attn.o_proj",
}
NORMS = {
    "blk.{layer}.attn_norm": BLOCK + "input_layernorm",
    "blk.{layer}.ffn_norm": BLOCK + "post_attention_layernorm",
}
ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GATED = {
    "blk.{layer}.ffn_gate": BLOCK + "mlp.gate_proj",
    "blk.{layer}.ffn_up": BLOCK + "mlp.up_proj",
    "blk.{layer}.ffn_down": BLOCK + "mlp.down_proj",
}
WITHOUT_FFN = {**ENDS, **ATTENTION, **NORMS}
LLAMA = {**WITHOUT_FFN, **GATED}
TIED = {name: other for name, other in LLAMA.items() if name != "output"}
HEAD_NORMS = {
    "blk.{layer}.attn_q_norm": BLOCK + "self_attn.q_norm",
    "blk.{layer}.attn_k_norm": BLOCK + "self_attn.k_norm",
}
POST_NORMS = {
    "blk.{layer}.post_attention_norm": BLOCK + "post_attention_layernorm",
    "blk.{layer}.post_ffw_norm": BLOCK + "post_feedforward_layernorm",
}
HALVES: dict[str, Change] = {
    "blk.{layer}.attn_q": "q_halves",
    "blk.{layer}.attn_k": "k_halves",
}
MIXTRAL_EXPERTS = {
    "blk.{layer}.ffn_gate_inp": BLOCK + "block_sparse_moe.gate",
    "blk.{layer}.ffn_gate_exps": BLOCK + "block_sparse_moe.experts.{expert}.w1",
    "blk.{layer}.ffn_down_exps": BLOCK + "block_sparse_moe.experts.{expert}.w2",
    "blk.{layer}.ffn_up_exps": BLOCK + "block_sparse_moe.experts.{expert}.w3",
}
QWEN_EXPERTS = {
    "blk.{layer}.ffn_gate_inp": BLOCK + "mlp.gate",
    "blk.{layer}.ffn_gate_exps": BLOCK + "mlp.experts.{expert}.gate_proj",
    "blk.{layer}.ffn_down_exps": BLOCK + "mlp.experts.{expert}.down_proj",
    "blk.{layer}.ffn_up_exps": BLOCK + "mlp.experts.{expert}.up_proj",
}
SHARED_EXPERT = {
    "blk.{layer}.ffn_gate_inp_shexp": BLOCK + "mlp.shared_expert_gate",
    "blk.{layer}.ffn_gate_shexp": BLOCK + "mlp.shared_expert.gate_proj",
    "blk.{layer}.ffn_up_shexp": BLOCK + "mlp.shared_expert.up_proj",
    "blk.{layer}.ffn_down_shexp": BLOCK + "mlp.shared_expert.down_proj",
}
DEEPSEEK_EXPERTS = {
    name: other.replace("shared_expert.", "shared_experts.")
    for name, other in {**QWEN_EXPERTS, **SHARED_EXPERT}.items()
    if not other.endswith("shared_expert_gate")
}
# One norm before attention and feed-forward; output and input share a table.
COMMAND_R = {name: other for name, other in TIED.items() if not name.endswith("ffn_norm")}
INTERNLM2 = {
    "token_embd": "model.tok_embeddings",
    "output_norm": "model.norm",
    "output": "output",
    "blk.{layer}.attn_norm": BLOCK + "attention_norm",
    "blk.{layer}.attn_q": BLOCK + "attention.wq",
    "blk.{layer}.attn_k": BLOCK + "attention.wk",
    "blk.{layer}.attn_v": BLOCK + "attention.wv",
    "blk.{layer}.attn_output": BLOCK + "attention.wo",
    "blk.{layer}.ffn_norm": BLOCK + "ffn_norm",
    "blk.{layer}.ffn_gate": BLOCK + "feed_forward.w1",
    "blk.{layer}.ffn_up": BLOCK + "feed_forward.w3",
    "blk.{layer}.ffn_down": BLOCK + "feed_forward.w2",
}
_CHATGLM_BLOCK = "transformer.encoder.layers.{layer}."
CHATGLM = {
    "token_embd": "transformer.embedding.word_embeddings",
    "output_norm": "transformer.encoder.final_layernorm",
    "output": "transformer.output_layer",
    "blk.{layer}.attn_norm": _CHATGLM_BLOCK + "input_layernorm",
    "blk.{layer}.attn_qkv": _CHATGLM_BLOCK + "self_attention.query_key_value",
    "blk.{layer}.attn_output": _CHATGLM_BLOCK + "self_attention.dense",
    "blk.{layer}.ffn_norm": _CHATGLM_BLOCK + "post_attention_layernorm",
    "blk.{layer}.ffn_up": _CHATGLM_BLOCK + "mlp.dense_h_to_4h",
    "blk.{layer}.ffn_down": _CHATGLM_BLOCK + "mlp.dense_4h_to_h",
}
GPT2_BLOCK = "transformer.h.{layer}."
GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{layer}.attn_norm": GPT2_BLOCK + "ln_1",
    "blk.{layer}.attn_qkv": GPT2_BLOCK + "attn.c_attn",
    "blk.{layer}.attn_output": GPT2_BLOCK + "attn.c_proj",
    "blk.{layer}.ffn_norm": GPT2_BLOCK + "ln_2",
    "blk.{layer}.ffn_up": GPT2_BLOCK + "mlp.c_fc",
    "blk.{layer}.ffn_down": GPT2_BLOCK + "mlp.c_proj",
}
QWEN = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{layer}.attn_norm": GPT2_BLOCK + "ln_1",
    "blk.{layer}.attn_qkv": GPT2_BLOCK + "attn.c_attn",
    "blk.{layer}.attn_output": GPT2_BLOCK + "attn.c_proj",
    "blk.{layer}.ffn_norm": GPT2_BLOCK + "ln_2",
    "blk.{layer}.ffn_up": GPT2_BLOCK + "mlp.w1",
    "blk.{layer}.ffn_gate": GPT2_BLOCK + "mlp.w2",
    "blk.{layer}.ffn_down": GPT2_BLOCK + "mlp.c_proj",
}
GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.{layer}.attn_norm": "gpt_neox.layers.{layer}.input_layernorm",
    "blk.{layer}.attn_qkv": "gpt_neox.layers.{layer}.attention.query_key_value",
    "blk.{layer}.attn_output": "gpt_neox.layers.{layer}.attention.dense",
    "blk.{layer}.ffn_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
    "blk.{layer}.ffn_up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
    "blk.{layer}.ffn_down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
}
GPT2_FIELDS: dict[str, str | None] = {
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
}

LAYER_NORM: Number = ("attention.layer_norm_epsilon", "real", None)
NO_RMS: dict[str, str | None] = {"rms_norm_eps": None}
EXPERTS: dict[str, Number] = {
    "num_experts": ("expert_count", "count", None),
    "num_experts_per_tok": ("expert_used_count", "count", None),
    "moe_intermediate_size": ("expert_feed_forward_length", "count", None),
}
DEEPSEEK_NUMBERS: dict[str, Number] = {
    "n_routed_experts": ("expert_count", "count", None),
    "num_experts_per_tok": ("expert_used_count", "count", None),
    "moe_intermediate_size": ("expert_feed_forward_length", "count", None),
    "n_shared_experts": ("expert_shared_count", "count", 0),
    "first_k_dense_replace": ("leading_dense_block_count", "count", 0),
    "routed_scaling_factor": ("expert_weights_scale", "real", 1.0),
}
GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
WINDOW: Number = ("attention.sliding_window", "count", None)


def plus_one(*names: str) -> dict[str, Change]:
    """Return the changes of norms that were stored less 1."""
    return {name: "plus_one" for name in names}
