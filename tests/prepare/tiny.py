"""Tiny models on disk: a converted artifact, and a raw Llama with random weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CHAT_CONFIG: dict[str, Any] = {
    "version": "0.1.0",
    "model_type": "llama",
    "quantization": "q4f16_1",
    "model_config": {"hidden_size": 8, "context_window_size": 64},
    "vocab_size": 16,
    "context_window_size": 64,
    "prefill_chunk_size": 32,
    "conv_template": {},
}


def write_artifact(directory: Path, **changes: Any) -> Path:
    """Write an artifact with one tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "mlc-chat-config.json").write_text(json.dumps({**CHAT_CONFIG, **changes}))
    shard = bytes(8)
    (directory / "params_shard_0.bin").write_bytes(shard)
    tensor = {"name": "w", "shape": [4], "dtype": "float16", "format": "raw", "nbytes": 8}
    record = {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": 8,
        "md5sum": hashlib.md5(shard).hexdigest(),
        "records": [{**tensor, "byteOffset": 0}],
    }
    (directory / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": [record]}))
    return directory


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_llama(directory: Path, seed: int = 0) -> Path:
    """Write a Hugging Face directory: config, a byte-level tokenizer, random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    tokenizer_config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return (random.standard_normal(shape) * 0.05).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weight(256, 64),
        "model.norm.weight": weight(64),
        "lm_head.weight": weight(256, 64),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (96, 64),
            "mlp.up_proj": (96, 64),
            "mlp.down_proj": (64, 96),
            "input_layernorm": (64,),
            "post_attention_layernorm": (64,),
        }.items():
            tensors[f"{prefix}{name}.weight"] = weight(*shape)
    save_file(tensors, directory / "model.safetensors")
    return directory


def _byte_tokenizer() -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:254]
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content
