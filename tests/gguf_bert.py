"""A BERT repository written as GGUF, as llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import numpy as np

from mlc_llm.weights.open import open_source

_POOLINGS = {"mean": 1, "cls": 2}
_SPECIAL = {"unknown": "[UNK]", "cls": "[CLS]", "seperator": "[SEP]", "padding": "[PAD]"}


def write_bert_gguf(directory: Path, path: Path, pooling: str, context: int | None = None) -> Path:
    """Write the model in `directory`, which has a vocab.txt; names come from the gguf package.

    context: the longest text, if not as many tokens as there are positions.
    """
    source = open_source(directory)
    config = source.config
    layers = config["num_hidden_layers"]
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, layers)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(context or config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(layers)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", _POOLINGS[pooling])
    _add_vocabulary(writer, directory, config["vocab_size"])
    for name in source.names():
        plain = name.removeprefix("bert.")
        if plain.startswith(("pooler.", "cls.")) or plain.endswith("position_ids"):
            continue
        stored = mapping.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.asarray(source.read(name)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    words = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    control = set(_SPECIAL.values()) | {"[MASK]"}
    spelled, types = [], []
    for word in words:
        if word in control:
            spelled.append(word)
        elif word.startswith("##"):
            spelled.append(word[2:])
        else:
            spelled.append("\u2581" + word)
        types.append(gguf.TokenType.CONTROL if word in control else gguf.TokenType.NORMAL)
    for number in range(len(words), vocab_size):
        spelled.append(f"[PAD{number}]")
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(spelled)
    writer.add_token_types(types)
    writer.add_token_type_count(2)
    for key, word in _SPECIAL.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", words.index(word))


def read_settings(directory: Path) -> dict:
    """Return what an artifact's configuration says, without what programs took it from."""
    return json.loads((directory / "mlc-chat-config.json").read_text())
