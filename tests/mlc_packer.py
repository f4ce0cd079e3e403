"""A second writer of MLC LLM's artifact layout, in NumPy, from a Hugging Face directory.

Knows the published layout only: file names, fields, bit packing and parameter names. Shares no code
with mlc_llm, so that an artifact it writes tests our reader as one made by MLC LLM would.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import mlc_names_deepseek
import mlc_names_dense
import mlc_names_gpt
import mlc_names_gpt_oss
import mlc_names_later
import mlc_names_llama4
import mlc_names_moe
import mlc_names_recurrent
import numpy as np
from numpy.typing import NDArray
from numpy_model import head_size, read_weights, rope_parameters
from packed_layouts import store_blocks, store_e4m3, store_e5m2

Array = NDArray[Any]

SHARD_CAP_BYTES = 32 << 20
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
CHATML: dict[str, Any] = {
    "name": "chatml",
    "system_template": "<|im_start|>system\n{system_message}<|im_end|>\n",
    "system_message": "You answer in one sentence.",
    "system_prefix_token_ids": None,
    "add_role_after_system_message": True,
    "roles": {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"},
    "role_templates": {
        "user": "{user_message}",
        "assistant": "{assistant_message}",
        "tool": "{tool_message}",
    },
    "messages": [],
    "seps": ["<|im_end|>\n"],
    "role_content_sep": "\n",
    "role_empty_sep": "\n",
    "stop_str": ["<|im_end|>"],
    "stop_token_ids": [2],
    "strip_reasoning_in_history": False,
    "function_string": "",
    "use_function_calling": False,
}


@dataclass(frozen=True)
class Format:
    """A quantization: bits 0 means none; transposed holds for linear layers, not embeddings."""

    dtype: Any
    bits: int = 0
    group_size: int = 32
    transposed: bool = False
    # What yields the stored arrays of a parameter, where groups do not.
    store: Callable[[str, Array], Iterator[tuple[str, Array]]] | None = None


FORMATS = {
    "q0f16": Format(np.float16),
    "q0bf16": Format(ml_dtypes.bfloat16),
    "q0f32": Format(np.float32),
    "q3f16_1": Format(np.float16, 3, 40),
    "q4f16_0": Format(np.float16, 4, transposed=True),
    "q4f16_1": Format(np.float16, 4),
    "q4f32_1": Format(np.float32, 4),
    # Not one of MLC LLM's schemes: its packing rule with 8 bits.
    "q8f16_1": Format(np.float16, 8),
    "e5m2_e5m2_f16": Format(np.float16, store=store_e5m2),
    "e4m3_e4m3_f16": Format(np.float16, store=store_e4m3),
    "e4m3_e4m3_f16_max_calibrate": Format(np.float16, store=store_e4m3),
    "fp8_e4m3fn_bf16_block_scale": Format(ml_dtypes.bfloat16, store=store_blocks(False)),
    "fp8_e4m3fn_bf16_block_scale_static_activation": Format(
        ml_dtypes.bfloat16, store=store_blocks(True)
    ),
}


def pack_artifact(
    source: Path,
    output: Path,
    quantization: str,
    *,
    index_name: str = "tensor-cache.json",
    conv_template: Mapping[str, Any] = CHATML,
    shard_cap_bytes: int = SHARD_CAP_BYTES,
) -> None:
    """Write config, weights and tokenizer of a Llama, Mistral or Qwen2 directory as MLC LLM does.

    index_name: "tensor-cache.json", or "ndarray-cache.json" as converters before September 2025.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    form = FORMATS[quantization]
    weights = read_weights(source)
    num_elements = sum(weight.size for weight in weights.values())
    shards = _Shards(output, shard_cap_bytes)
    for name, weight in fuse(config, weights):
        for stored_name, array in quantize(name, weight.astype(form.dtype), form):
            shards.add(stored_name, array)
    shards.close()
    size_bytes = sum(shard["nbytes"] for shard in shards.index)
    metadata = {
        "ParamSize": sum(len(shard["records"]) for shard in shards.index),
        "ParamBytes": size_bytes,
        "BitsPerParam": size_bytes * 8 / num_elements,
    }
    _write_json(output / index_name, {"metadata": metadata, "records": shards.index})
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in present:
        shutil.copyfile(source / name, output / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    chat_config = make_chat_config(config, tokenizer, quantization, conv_template, present)
    _write_json(output / "mlc-chat-config.json", chat_config)


def fuse(config: Mapping[str, Any], weights: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield parameters under MLC names: [q; k; v] and [gate; up] are one matrix each."""
    if config["model_type"] in mlc_names_dense.MODEL_TYPES:
        yield from mlc_names_dense.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_later.MODEL_TYPES:
        yield from mlc_names_later.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_deepseek.MODEL_TYPES:
        yield from mlc_names_deepseek.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_llama4.MODEL_TYPES:
        yield from mlc_names_llama4.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_gpt.MODEL_TYPES:
        yield from mlc_names_gpt.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_gpt_oss.MODEL_TYPES:
        yield from mlc_names_gpt_oss.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_moe.MODEL_TYPES:
        yield from mlc_names_moe.fuse(config, weights)
        return
    if config["model_type"] in mlc_names_recurrent.MODEL_TYPES:
        yield from mlc_names_recurrent.fuse(config, weights)
        return
    qkv = "self_attn.c_attn" if config["model_type"] == "qwen2" else "self_attn.qkv_proj"
    fused = {
        qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj": ["self_attn.o_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj": ["mlp.down_proj"],
        "input_layernorm": ["input_layernorm"],
        "post_attention_layernorm": ["post_attention_layernorm"],
    }
    yield "model.embed_tokens.weight", weights["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, parts in fused.items():
            for kind in (".weight", ".bias"):
                if prefix + parts[0] + kind in weights:
                    joined = np.concatenate([weights[prefix + part + kind] for part in parts])
                    yield prefix + name + kind, joined
    yield "model.norm.weight", weights["model.norm.weight"]
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", weights["lm_head.weight"]


def quantize(name: str, weight: Array, form: Format) -> Iterator[tuple[str, Array]]:
    """Yield what a parameter is stored as: itself, or `.q_weight` and `.q_scale`."""
    if form.store is not None:
        yield from form.store(name, weight)
        return
    is_gate = name.endswith("gate.weight") and len(weight) <= 256
    is_layer = weight.ndim > 1 and name.endswith(".weight")  # others are raw parameters
    if form.bits == 0 or not is_layer or is_gate:
        yield name, weight
        return
    base = name.removesuffix(".weight")
    packed, scale = pack_groups(weight.reshape(-1, weight.shape[-1]), form)
    packed = packed.reshape(*weight.shape[:-1], -1)  # experts stay apart
    scale = scale.reshape(*weight.shape[:-1], -1)
    if form.transposed and weight.ndim == 2 and base != "model.embed_tokens":
        packed, scale = packed.T, scale.T
    yield base + ".q_weight", packed
    yield base + ".q_scale", scale


def pack_groups(weight: Array, form: Format) -> tuple[Array, Array]:
    """Return uint32 words (out, words) and scales (out, groups) of a matrix (out, in)."""
    rows, columns = weight.shape
    largest, per_word = 2 ** (form.bits - 1) - 1, 32 // form.bits
    padding = -columns % form.group_size
    groups = np.pad(weight.astype(np.float32), ((0, 0), (0, padding)))
    groups = groups.reshape(rows, -1, form.group_size)
    scale = (np.abs(groups).max(axis=-1) / largest).astype(form.dtype)
    divisor = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.rint(groups / divisor[:, :, None] + largest).clip(0, 2 * largest)
    # The words are whole, so padding columns would hold the zero point; MLC LLM writes 0 there.
    codes = codes.reshape(rows, -1).astype(np.uint32)
    codes[:, columns:] = 0
    fields = codes.reshape(rows, -1, per_word)
    words = np.zeros(fields.shape[:2], np.uint32)
    for place in range(per_word):
        words |= fields[:, :, place] << np.uint32(place * form.bits)
    return words, scale


def make_chat_config(
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    quantization: str,
    conv_template: Mapping[str, Any],
    tokenizer_files: list[str],
) -> dict[str, Any]:
    """Return the content of mlc-chat-config.json."""
    is_mistral = config["model_type"] == "mistral"
    window = config.get("sliding_window") or -1 if is_mistral else -1
    # A sliding window stands in place of a context window.
    positions = config.get("max_position_embeddings") or config.get("n_positions") or -1
    context = positions if window == -1 else -1
    chunk = min(max(context, window), 8192) if max(context, window) > 0 else 4096
    vocab = set(tokenizer["model"]["vocab"])
    vocab.update(token["content"] for token in tokenizer.get("added_tokens", ()))
    return {
        "version": "0.1.0",
        "model_type": config["model_type"],
        "quantization": quantization,
        "model_config": make_model_config(config, context, window, chunk),
        "vocab_size": config["vocab_size"],
        "context_window_size": context,
        "sliding_window_size": window,
        "prefill_chunk_size": chunk,
        "attention_sink_size": 4 if is_mistral else -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": len(vocab),
        "temperature": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "top_p": 1.0,
        "tokenizer_files": tokenizer_files,
        "tokenizer_info": detect_tokenizer_info(tokenizer),
        "conv_template": dict(conv_template),
        "pad_token_id": config.get("pad_token_id") or 0,
        "bos_token_id": config.get("bos_token_id", 1),
        "eos_token_id": config.get("eos_token_id", 2),
        "model_task": "chat",
        "embedding_metadata": None,
    }


def make_model_config(
    config: Mapping[str, Any], context: int, window: int, chunk: int
) -> dict[str, Any]:
    """Return the `model_config` object: the fields of MLC LLM's class of this architecture."""
    if config["model_type"] in (*mlc_names_dense.MODEL_TYPES, *mlc_names_later.MODEL_TYPES):
        limits = {"context_window_size": context, "prefill_chunk_size": chunk}
        return {**mlc_names_dense.model_config(config), **limits, "max_batch_size": 128}
    if config["model_type"] in mlc_names_deepseek.MODEL_TYPES:
        limits = {"context_window_size": context, "prefill_chunk_size": chunk}
        return {**mlc_names_deepseek.model_config(config), **limits, "max_batch_size": 128}
    if config["model_type"] in mlc_names_llama4.MODEL_TYPES:
        limits = {"context_window_size": context, "prefill_chunk_size": chunk}
        return {**mlc_names_llama4.model_config(config), **limits, "max_batch_size": 128}
    if config["model_type"] in mlc_names_gpt.MODEL_TYPES:
        limits = {"context_window_size": context, "prefill_chunk_size": chunk}
        return {**mlc_names_gpt.model_config(config), **limits, "tensor_parallel_shards": 1}
    if config["model_type"] in mlc_names_gpt_oss.MODEL_TYPES:
        limits = {"context_window_size": context, "prefill_chunk_size": chunk}
        return {**mlc_names_gpt_oss.model_config(config), **limits, "max_batch_size": 128}
    if config["model_type"] in mlc_names_recurrent.MODEL_TYPES:
        limits = {"context_window_size": context, "prefill_chunk_size": chunk}
        return {**mlc_names_recurrent.model_config(config), **limits, "max_batch_size": 1}
    rope = rope_parameters(config)
    copied = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    fields = {name: config[name] for name in (*copied, "rms_norm_eps", "vocab_size")}
    fields.update(
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=head_size(config),
        context_window_size=context,
        prefill_chunk_size=chunk,
        tensor_parallel_shards=1,
        max_batch_size=128,
        kwargs={},
    )
    if config["model_type"] in mlc_names_moe.MODEL_TYPES:
        fields.update(mlc_names_moe.model_config(config))
    if config["model_type"].startswith("qwen"):
        fields.update(hidden_act=config["hidden_act"], rope_theta=rope["rope_theta"])
        fields.update(tie_word_embeddings=config["tie_word_embeddings"], dtype="float32")
        return fields
    fields["position_embedding_base"] = rope["rope_theta"]
    if config["model_type"] == "mistral":
        fields.update(sliding_window_size=window, attention_sink_size=4)
        return fields
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    fields.update(tie_word_embeddings=config.get("tie_word_embeddings", False))
    fields.update(pipeline_parallel_stages=1, disaggregation=False)
    return fields


def detect_tokenizer_info(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return how token text becomes bytes, from the steps of tokenizer.json."""
    decoders = _steps(tokenizer.get("decoder"), "decoders")
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    is_byte_level = any(step["type"] == "ByteLevel" for step in decoders)
    return {
        "token_postproc_method": "byte_level" if is_byte_level else "byte_fallback",
        "prepend_space_in_encode": any(
            step["type"] == "Prepend" and step["prepend"] == "▁"
            for step in _steps(tokenizer.get("normalizer"), "normalizers")
        ),
        "strip_space_in_decode": strip in decoders,
    }


def _steps(step: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [dict(step)]


@dataclass
class _Shards:
    """Writes `params_shard_N.bin` of at most `cap_bytes`; large tensors get one of their own."""

    directory: Path
    cap_bytes: int
    index: list[dict[str, Any]] = field(default_factory=list)
    _pending: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    _pending_bytes: int = 0

    def add(self, name: str, array: Array) -> None:
        """Store a tensor; float32 goes to disk with bfloat16 precision, as the label says."""
        stored = array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array
        content = np.ascontiguousarray(stored).tobytes()
        record = {
            "name": name,
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "format": "f32-to-bf16",
            "nbytes": len(content),
        }
        if self._pending_bytes + len(content) >= self.cap_bytes:
            if len(content) * 2 >= self.cap_bytes:
                self._write([(record, content)])
                return
            self.close()
        self._pending.append((record, content))
        self._pending_bytes += len(content)

    def close(self) -> None:
        """Write what is left."""
        if self._pending:
            self._write(self._pending)
        self._pending, self._pending_bytes = [], 0

    def _write(self, items: list[tuple[dict[str, Any], bytes]]) -> None:
        content = b"".join(data for _, data in items)
        name = f"params_shard_{len(self.index)}.bin"
        offset = 0
        for record, data in items:
            record["byteOffset"] = offset
            offset += len(data)
        (self.directory / name).write_bytes(content)
        shard = {"dataPath": name, "format": "raw-shard", "nbytes": len(content)}
        shard["records"] = [record for record, _ in items]
        shard["md5sum"] = hashlib.md5(content).hexdigest()
        self.index.append(shard)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2))
