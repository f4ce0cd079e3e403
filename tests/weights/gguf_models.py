"""Tiny GGUF files of every architecture that is read."""

import gguf
import numpy as np
from make_gguf import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, interleave_halves, write_gguf

from mlc_llm.weights.gguf_architectures import ARCHITECTURES, MIXTRAL, PHI_MSFT
from mlc_llm.weights.gguf_deepseek import DEEPSEEK3
from mlc_llm.weights.gguf_later import GLM, OLMO3

EXPERTS, RANK = 3, 20
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

# Shapes as Hugging Face has them, under GGUF's names.
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "position_embd": (128, HIDDEN),
    "output_norm": (HIDDEN,),
    "output": (VOCAB, HIDDEN),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "post_attention_norm": (HIDDEN,),
    "post_ffw_norm": (HIDDEN,),
    "attn_q": (Q, HIDDEN),
    "attn_k": (KV, HIDDEN),
    "attn_v": (KV, HIDDEN),
    "attn_qkv": (3 * Q, HIDDEN),
    "attn_output": (HIDDEN, Q),
    "attn_q_norm": (HEAD_DIM,),
    "attn_k_norm": (HEAD_DIM,),
    "attn_sinks": (HEADS,),
    "attn_q_a": (RANK, HIDDEN),
    "attn_q_a_norm": (RANK,),
    "attn_q_b": (HEADS * 24, RANK),
    "attn_kv_a_mqa": (RANK + 8, HIDDEN),
    "attn_kv_a_norm": (RANK,),
    "attn_kv_b": (HEADS * 32, RANK),
    "attn_k_b": (HEADS, RANK, 16),
    "attn_v_b": (HEADS, 16, RANK),
    "exp_probs_b": (EXPERTS,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
    "ffn_gate_inp": (EXPERTS, HIDDEN),
    "ffn_gate_exps": (EXPERTS, 32, HIDDEN),
    "ffn_up_exps": (EXPERTS, 32, HIDDEN),
    "ffn_down_exps": (EXPERTS, HIDDEN, 32),
    "ffn_gate_inp_shexp": (1, HIDDEN),
    "ffn_gate_shexp": (FFN, HIDDEN),
    "ffn_up_shexp": (FFN, HIDDEN),
    "ffn_down_shexp": (HIDDEN, FFN),
}
METADATA = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": FFN,
    "attention.layer_norm_epsilon": 1e-5,
    "logit_scale": 0.25,
    "attention.scale": 0.25,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
}
WITHOUT_EXPERTS = {key: value for key, value in METADATA.items() if "expert" not in key}
# With arithmetic or names of their own: tried with references, not with a table of shapes.
OWN_ARITHMETIC = (
    *("bert", "granitemoe", "llama4", "qwen3next", "qwen35", "qwen35moe", "rwkv6", "glm4moe"),
)
_TABLES = {name: item for name, item in ARCHITECTURES.items() if name not in OWN_ARITHMETIC}
# Told apart by their content.
_TOLD_APART = {
    "mixtral": ("llama", MIXTRAL),
    "phi-msft": ("phi2", PHI_MSFT),
    "deepseek_v3": ("deepseek2", DEEPSEEK3),
    "glm": ("chatglm", GLM),
    "olmo3": ("olmo2", OLMO3),
}
CASES = {**_TABLES, **{name: item for name, (_, item) in _TOLD_APART.items()}}
STORED_AS = {name: stored for name, (stored, _) in _TOLD_APART.items()}
# Heads of 24 values, 8 of them rotated, and of 16.
LATENT = {
    "attention.kv_lora_rank": RANK,
    "attention.q_lora_rank": RANK,
    "attention.head_count_kv": 1,
    "attention.key_length": RANK + 8,
    "attention.value_length": RANK,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
}


def tensor_names(architecture):
    """Return GGUF name -> Hugging Face name of one layer, endings included."""
    return {
        f"{name}.weight".format(layer=0): f"{other}.weight".replace("{layer}", "0")
        for name, other in architecture.tensors.items()
    }


def as_stored(tensor, change):
    """Change a tensor as llama.cpp's converter does, one element after another."""
    match change:
        case "q_halves":
            return interleave_halves(tensor, HEADS)
        case "k_halves":
            return interleave_halves(tensor, KV_HEADS)
        case "plus_one":
            return tensor + np.float32(1)
        case "transposed":
            return np.ascontiguousarray(tensor.T)
        case "flat":
            return tensor[0]
        case "qkv_groups":
            parts = [[], [], []]
            for row in range(len(tensor)):
                parts[row // HEAD_DIM % 3].append(tensor[row])
            return np.concatenate([np.array(part) for part in parts])
    return tensor


def write_model(path, name, metadata=None, quantization=gguf.GGMLQuantizationType.F32):
    """Write a model of one layer; return its file and its tensors as Hugging Face has them."""
    architecture = CASES[name]
    rng = np.random.default_rng(17)
    stored, expected = {}, {}
    for gguf_name, huggingface_name in tensor_names(architecture).items():
        pattern = gguf_name.removesuffix(".weight").replace("blk.0", "blk.{layer}")
        change = architecture.changes.get(pattern)
        shape = SHAPES[pattern.removeprefix("blk.{layer}.")]
        if change == "transposed":
            shape = shape[::-1]
        tensor = rng.standard_normal(shape).astype(np.float32)
        stored[gguf_name] = as_stored(tensor, change)
        if "{expert}" in huggingface_name:
            for expert in range(EXPERTS):
                expected[huggingface_name.replace("{expert}", str(expert))] = tensor[expert]
        else:
            expected[huggingface_name] = tensor
    has_experts = any("{expert}" in other for other in architecture.tensors.values())
    values = {**(METADATA if has_experts else WITHOUT_EXPERTS), **(metadata or {})}
    if architecture.with_window:
        values.setdefault("attention.sliding_window", 64)
    if architecture.is_latent:
        scoring = {"expert_gating_func": 2} if name == "deepseek_v3" else {}
        values = {**values, **LATENT, **scoring, **(metadata or {})}
    arch = STORED_AS.get(name, name)
    write_gguf(path, stored, arch=arch, metadata=values, quantization=quantization)
    return path, expected
