"""Write small GGUF files with the gguf package: a Llama or Qwen2 of one or more layers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS = 40, 64, 96, 4, 2
HEAD_DIM = HIDDEN // HEADS

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}


def make_tensors(tied: bool = False, bias: bool = False) -> dict[str, np.ndarray]:
    """Return float32 tensors under ggml names, rows as Hugging Face orders them."""
    rng = np.random.default_rng(7)
    kv = KV_HEADS * HEAD_DIM
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    if not tied:
        shapes["output"] = (VOCAB, HIDDEN)
    named = {f"{name}.weight": shape for name, shape in shapes.items()}
    if bias:
        for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            named[f"blk.0.attn_{part}.bias"] = (rows,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in named.items()}


def interleave_halves(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of q or k as llama.cpp's converter does for Llama: x0, y0, x1, y1, ..."""
    out = np.empty_like(tensor)
    head_dim = len(tensor) // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                row = head * head_dim + half * (head_dim // 2) + pair
                out[head * head_dim + 2 * pair + half] = tensor[row]
    return out


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    arch: str = "llama",
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    remove: tuple[str, ...] = (),
) -> Path:
    """Write a file; matrices are quantized, vectors stay float32.

    `metadata` adds to or replaces the architecture's keys (without its prefix).
    """
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if key not in remove:
            add_value(writer, f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            data = gguf.quantize(tensor, quantization)
            writer.add_tensor(name, data, raw_dtype=quantization)
    finish(writer)
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add metadata under a full key, by the Python type of the value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything added so far to the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
