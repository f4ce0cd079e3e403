"""BERT in GGUF files: encoders for embeddings, among them those of XLM-RoBERTa's kind.

The converter drops the first entries of XLM-RoBERTa's positions, which no token has: what is left
is BERT. Vectors are made of token states by prepare/gguf_sentences.py.
"""

from __future__ import annotations

from typing import Any

from mlc_llm.errors import UnsupportedModel
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_parts import LAYER_NORM, Architecture

_LAYER = "encoder.layer.{layer}."
_TABLES = {
    "max_position_embeddings": "position_embd.weight",
    "type_vocab_size": "token_types.weight",
}


def _finish(file: GGUFFile, config: dict[str, Any]) -> None:
    """Set what the file has in its tensors; refuse what is no encoder for embeddings."""
    if file.get("bert.attention.causal", bool, False):
        raise UnsupportedModel(f"{file.path} has causal attention in BERT, which is not supported")
    if any(name.startswith("cls.") for name in file.tensors):
        raise UnsupportedModel(
            f"{file.path} is a BERT that scores texts (it has a tensor cls), which is not "
            "supported; use one for embeddings"
        )
    for field, name in _TABLES.items():
        if name in file.tensors:
            *rows, _ = file.tensors[name].shape
            config[field] = rows[0] if rows else 1  # quantizing drops an extent of 1


BERT = Architecture(
    "bert",
    "BertModel",
    {
        "token_embd": "embeddings.word_embeddings",
        "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "token_embd_norm": "embeddings.LayerNorm",
        "blk.{layer}.attn_q": _LAYER + "attention.self.query",
        "blk.{layer}.attn_k": _LAYER + "attention.self.key",
        "blk.{layer}.attn_v": _LAYER + "attention.self.value",
        "blk.{layer}.attn_output": _LAYER + "attention.output.dense",
        "blk.{layer}.attn_output_norm": _LAYER + "attention.output.LayerNorm",
        "blk.{layer}.ffn_up": _LAYER + "intermediate.dense",
        "blk.{layer}.ffn_down": _LAYER + "output.dense",
        "blk.{layer}.layer_output_norm": _LAYER + "output.LayerNorm",
    },
    {"token_types": "flat"},
    fields={
        "num_key_value_heads": None,
        "rms_norm_eps": None,
        "rope_theta": None,
        "rope_scaling": None,
        "attention_bias": None,
        "mlp_bias": None,
    },
    numbers={"layer_norm_eps": LAYER_NORM},
    constants={"hidden_act": "gelu"},
    finish=_finish,
)
