"""GGUF checkpoints under Hugging Face names: tensor names, row order and `config.json` content.

Knows the architectures in ARCHITECTURES. The container is read by gguf_file.py; the tokenizer is
rebuilt by prepare/gguf_tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.quantization.encoded import GroupCodes
from mlc_llm.quantization.formats import OTHER_ENCODING
from mlc_llm.weights.gguf_codes import FORMATS, decode_blocks
from mlc_llm.weights.gguf_file import UNQUANTIZED, GGUFFile
from mlc_llm.weights.gguf_rope import find_llama3_scaling

__all__ = ["ARCHITECTURES", "GGUFSource"]


@dataclass(frozen=True)
class _Architecture:
    model_type: str
    class_name: str
    # llama.cpp's converter interleaves the two rotary halves of q and k rows for this one.
    permuted: bool


ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
}

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tables a program can compute from the configuration; not parameters.
_ROPE_FACTORS = "rope_freqs.weight"
_TABLES = re.compile(r"^(rope_freqs|(blk\.\d+\.)?attn_rot_embd)\.weight$")
_BLOCK_TENSOR = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$")
_QUERY_OR_KEY = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


class GGUFSource:
    """A `.gguf` file (or all parts of a split one); satisfies EncodedSource."""

    def __init__(self, path: Path) -> None:
        """Read headers and rebuild the configuration.

        Raises CorruptFile, or UnsupportedModel naming an architecture or feature we do not know.
        """
        self._file = GGUFFile(path)
        name = self._file.get("general.architecture", str)
        if name is None:
            raise CorruptFile(f"{path} does not say its architecture; is it a model?")
        if name not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{path} has architecture {name!r:.60}; GGUF works for {', '.join(ARCHITECTURES)}"
            )
        self._architecture = ARCHITECTURES[name]
        self._names = {
            _huggingface_name(tensor): tensor
            for tensor in self._file.tensors
            if not _TABLES.match(tensor)
        }
        self.config: dict[str, Any] = _build_config(self._file, name)

    def names(self) -> list[str]:
        """Return the Hugging Face names of all parameters."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises ParameterMismatch if unknown."""
        return self._file.tensors[self._find(name)].shape

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor in Hugging Face row order, dequantized to float32 where it must be."""
        return self._in_order(self._file.read(self._find(name)), name)

    def encoding(self, name: str) -> str | None:
        """Return the format that a tensor's codes fit, or OTHER_ENCODING; None for plain ones."""
        tensor = self._file.tensors[self._find(name)]
        if tensor.type.name in UNQUANTIZED or len(tensor.shape) != 2:
            return None
        return FORMATS.get(tensor.type.name, OTHER_ENCODING)

    def read_encoded(self, name: str) -> GroupCodes | None:
        """Return a tensor's codes in Hugging Face row order, None where they cannot be kept."""
        stored = self._find(name)
        tensor = self._file.tensors[stored]
        kind = tensor.type
        if kind.name not in FORMATS or len(tensor.shape) != 2:
            return None
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = self._file.read_bytes(stored).reshape(-1, block_bytes)
        decoded = decode_blocks(blocks, kind.name, tensor.shape[0])
        minimum = decoded.minimum
        return dataclasses.replace(
            decoded,
            codes=self._in_order(decoded.codes, name),
            scale=self._in_order(decoded.scale, name),
            minimum=None if minimum is None else self._in_order(minimum, name),
        )

    def _in_order(self, rows: NDArray[Any], name: str) -> NDArray[Any]:
        """Return rows as Hugging Face orders them."""
        match = _QUERY_OR_KEY.search(name)
        if match and self._architecture.permuted:
            heads = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            return _restore_halves(rows, self.config[heads], name)
        return rows

    def files(self) -> list[Path]:
        """Return the parts of the file."""
        return self._file.parts

    def close(self) -> None:
        """Forget the headers; mappings live as long as the arrays handed out."""
        self._names = {}

    def _find(self, name: str) -> str:
        if name not in self._names:
            raise ParameterMismatch(f"{self._file.path} has no tensor for {name}")
        return self._names[name]


def _huggingface_name(name: str) -> str:
    """Translate a name; an unknown one stays, so that the converter reports it as surplus."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES and kind in ("weight", "bias"):
        return f"{_TOP_NAMES[stem]}.{kind}"
    match = _BLOCK_TENSOR.match(name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    return name


def _restore_halves(tensor: NDArray[Any], num_heads: int, name: str) -> NDArray[Any]:
    """Undo the interleaving of q and k rows: (x0, y0, x1, y1, ...) back to (x0, x1, ..., y0, ...).

    tensor: (heads * head_dim, ...); rotary position embedding pairs row i with i + head_dim / 2.
    """
    rows, *rest = tensor.shape
    if rows % (2 * num_heads):
        raise ParameterMismatch(f"{name} has {rows} rows, which {num_heads} heads cannot share")
    paired = tensor.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(tensor.shape)


def _build_config(file: GGUFFile, arch: str) -> dict[str, Any]:
    """Return what `config.json` of the original model says, as far as programs need it."""
    reader = _MetadataReader(file, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ParameterMismatch(f"{file.path} has no embedding table (token_embd.weight)")
    hidden_size = reader.count("embedding_length")
    num_heads = reader.count("attention.head_count")
    head_dim = reader.count("attention.key_length", hidden_size // num_heads)
    if head_dim == 0 or head_dim % 2:
        raise CorruptFile(f"{file.path}: {num_heads} heads of {head_dim} values make no model")
    reader.refuse_unless("attention.value_length", head_dim, "value heads of another size")
    reader.refuse_unless("rope.dimension_count", head_dim, "partial rotary embedding")
    reader.refuse_unless("expert_count", 0, "experts")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch].class_name],
        "model_type": ARCHITECTURES[arch].model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": reader.count("feed_forward_length"),
        "max_position_embeddings": reader.count("context_length"),
        "num_attention_heads": num_heads,
        "num_hidden_layers": reader.count("block_count"),
        "num_key_value_heads": reader.count("attention.head_count_kv", num_heads),
        "rms_norm_eps": reader.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": reader.real("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "vocab_size": embedding.shape[0],
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}.get(embedding.type.name, "float16"),
    }
    if head_dim * num_heads != hidden_size:
        config["head_dim"] = head_dim
    config["rope_scaling"] = _rope_scaling(file, reader, config, head_dim)
    _add_sliding_window(reader, config)
    for key in ("bos", "eos"):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            config[f"{key}_token_id"] = token_id
    return config


def _rope_scaling(
    file: GGUFFile, reader: _MetadataReader, config: dict[str, Any], head_dim: int
) -> dict[str, Any] | None:
    kind = reader.text("rope.scaling.type", "none")
    factor = reader.real("rope.scaling.factor", reader.real("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise UnsupportedModel(
            f"{file.path} scales RoPE by {kind!r:.40}; none, linear and llama3 are supported"
        )
    if _ROPE_FACTORS in file.tensors:
        factors = file.read(_ROPE_FACTORS).astype(np.float64).ravel()
        return find_llama3_scaling(factors, config["rope_theta"], head_dim, str(file.path))
    if factor in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "type": "linear", "factor": factor}


def _add_sliding_window(reader: _MetadataReader, config: dict[str, Any]) -> None:
    window = reader.count("attention.sliding_window", 0)
    if not window:
        return
    if config["model_type"] != "llama":
        raise UnsupportedModel(
            f"{reader.path} has a sliding window of {window}, "
            f"which {config['model_type']} models do not support"
        )
    # Mistral is stored as llama; the window is what tells them apart.
    config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)


class _MetadataReader:
    """Metadata of one architecture, with the checks every number needs."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.path, self._file, self._arch = file.path, file, arch

    def count(self, key: str, default: int | None = None) -> int:
        value = self._file.get(f"{self._arch}.{key}", (int, list), default)
        if isinstance(value, list):
            return self._same_in_all_layers(key, value)
        if value is None or value < 0 or (value == 0 and default is None):
            raise CorruptFile(f"{self.path}: metadata {self._arch}.{key} is {value}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        value = self._file.get(f"{self._arch}.{key}", (float, int), default)
        if value is None or not 0 <= value < 1e30:
            raise CorruptFile(f"{self.path}: metadata {self._arch}.{key} is {value}")
        # Stored as float32: the shortest decimal number that means the same is what was meant.
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        return str(self._file.get(f"{self._arch}.{key}", str, default))

    def refuse_unless(self, key: str, expected: int, feature: str) -> None:
        found = self.count(key, expected)
        if found != expected:
            raise UnsupportedModel(
                f"{self.path} has {feature} ({self._arch}.{key} is {found}), which is not supported"
            )

    def _same_in_all_layers(self, key: str, values: list[Any]) -> int:
        if len(set(values)) != 1 or type(values[0]) is not int or values[0] <= 0:
            raise UnsupportedModel(
                f"{self.path}: {self._arch}.{key} differs from layer to layer, "
                "which is not supported"
            )
        return int(values[0])
