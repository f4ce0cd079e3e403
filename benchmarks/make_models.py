"""Write checkpoints of real shapes with random weights, in Hugging Face form and as GGUF.

The tokenizer is synthetic: byte-level BPE, exactly as many tokens as the shape says, merges of
printable characters. Speed depends on shapes alone, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from engine import DEFAULT_HOME, Shape, shape_names
from numpy.typing import NDArray

SEED = 20261121
PROMPT_TOKENS = 32
_DONE = "complete"
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_LAYER_MATRICES = (
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)
_LAYER_NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))


def make_checkpoint(shape: Shape) -> None:
    """Write the Hugging Face directory and the prompt, unless both are complete."""
    target = shape.checkpoint
    if (target / _DONE).exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(dict(shape.config), indent=2))
    generation = {key: shape.config[key] for key in ("bos_token_id", "eos_token_id")}
    (target / "generation_config.json").write_text(json.dumps(generation))
    tokens, merges = make_vocabulary(shape)
    _write_tokenizer(shape, tokens, merges)
    _write_weights(shape)
    (shape.directory / "prompt_32.txt").write_text(_make_prompt(target / "tokenizer.json"))
    (target / _DONE).touch()


def special_ids(shape: Shape) -> list[int]:
    """Return the ids of the tokens that are no text."""
    return [shape.config["bos_token_id"], shape.config["eos_token_id"]]


def make_vocabulary(shape: Shape) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the tokens in order of id, and the merges: pairs first, then triples."""
    size = int(shape.config["vocab_size"])
    special = {token: f"<|special_{token}|>" for token in special_ids(shape)}
    texts, merges = list(_byte_characters()), []
    letters = string.ascii_lowercase + string.ascii_uppercase + string.digits
    pairs = [(a, b) for a, b in itertools.product("\u0120" + letters, letters)]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, letters))
    for left, right in itertools.islice(
        itertools.chain(pairs, triples), size - len(special) - len(texts)
    ):
        merges.append((left, right))
        texts.append(left + right)
    plain = iter(texts)
    return [special.get(token) or next(plain) for token in range(size)], merges


def _byte_characters() -> Iterator[str]:
    """Yield the 256 characters that stand for bytes in GPT-2's byte-level BPE."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = itertools.count(256)
    for byte in range(256):
        yield chr(byte) if byte in printable else chr(next(stand_ins))


def _write_tokenizer(shape: Shape, tokens: list[str], merges: list[tuple[str, str]]) -> None:
    target = shape.checkpoint
    marks = [
        {
            "id": token,
            "content": tokens[token],
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token in sorted(special_ids(shape))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": marks,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
        },
    }
    (target / "tokenizer.json").write_text(json.dumps(description))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[shape.config["bos_token_id"]],
        "eos_token": tokens[shape.config["eos_token_id"]],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
        "model_max_length": shape.config["max_position_embeddings"],
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _make_prompt(tokenizer_path: Path) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    text = "tell"
    for word in itertools.cycle(" me what you know of the sea and why it is salt".split()):
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        if count == PROMPT_TOKENS:
            return text
        text += f" {word}" if count < PROMPT_TOKENS - 2 else " a"
    raise AssertionError("a cycle of words does not end")


def tensor_pieces(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the names and shapes of the tensors of each file: the embedding, then each layer."""
    config = shape.config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    extents = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    extents += [(inner, hidden), (inner, hidden), (hidden, inner)]
    yield {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        names = [f"{start}{name}.weight" for name, _ in _LAYER_MATRICES]
        piece: dict[str, tuple[int, ...]] = dict(zip(names, extents, strict=True))
        piece.update({f"{start}{name}.weight": (hidden,) for name, _ in _LAYER_NORMS})
        yield piece


def _write_weights(shape: Shape) -> None:
    from safetensors.numpy import save_file

    generator = np.random.default_rng(SEED)
    pieces = list(tensor_pieces(shape))
    file_of_tensor = {}
    for number, piece in enumerate(pieces, start=1):
        name = f"model-{number:05d}-of-{len(pieces):05d}.safetensors"
        tensors = {tensor: _random(generator, extents) for tensor, extents in piece.items()}
        save_file(tensors, shape.checkpoint / name, metadata={"format": "pt"})
        file_of_tensor.update(dict.fromkeys(piece, name))
    size = sum(2 * math.prod(extents) for piece in pieces for extents in piece.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of_tensor}
    (shape.checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(generator: np.random.Generator, extents: tuple[int, ...]) -> NDArray[np.float16]:
    if len(extents) == 1:
        return np.ones(extents, np.float16)
    values = generator.standard_normal(extents, np.float32)
    values /= math.sqrt(extents[-1])
    return values.astype(np.float16)


def write_gguf(shape: Shape, path: Path) -> None:
    """Write the checkpoint as a float16 GGUF file. Holds all of it in memory."""
    import gguf
    from safetensors import safe_open

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    _write_metadata(writer, shape)
    names = _gguf_names(shape.config["num_hidden_layers"])
    heads = {
        "q_proj": shape.config["num_attention_heads"],
        "k_proj": shape.config["num_key_value_heads"],
    }
    if factors := _rope_factors(shape.config):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for source in sorted(shape.checkpoint.glob("*.safetensors")):
        with safe_open(source, framework="numpy") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                num_heads = heads.get(name.split(".")[-2])
                if num_heads is not None:
                    value = _interleave_halves(value, num_heads)
                writer.add_tensor(names[name], value if value.ndim > 1 else np.float32(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: Any, shape: Shape) -> None:
    import gguf

    config = shape.config
    tokens, merges = make_vocabulary(shape)
    special = set(special_ids(shape))
    writer.add_name(shape.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[number in special] for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)


def _gguf_names(num_layers: int) -> dict[str, str]:
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for layer, (name, short) in itertools.product(
        range(num_layers), _LAYER_MATRICES + _LAYER_NORMS
    ):
        names[f"model.layers.{layer}.{name}.weight"] = f"blk.{layer}.{short}.weight"
    return names


def _interleave_halves(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Reorder the rows of a head from halves to pairs, the order of GGUF's Llama rope."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _rope_factors(config: Any) -> list[float]:
    """Return by what each frequency of Llama 3's long rope is divided; nothing for plain rope."""
    scaling = config["rope_scaling"]
    if scaling is None:
        return []
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for pair in range(config["head_dim"] // 2):
        period = 2 * math.pi * config["rope_theta"] ** (2 * pair / config["head_dim"])
        blend = min(1.0, max(0.0, (original / period - low) / (high - low)))
        factors.append(1 / (blend + (1 - blend) / scaling["factor"]))
    return factors


def main() -> None:
    """Write the checkpoints of the shapes named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help="where models are kept")
    parser.add_argument("--shape", action="append", choices=shape_names(), help="all if left out")
    parser.add_argument("--gguf", action="store_true", help="write model-f16.gguf as well")
    arguments = parser.parse_args()
    for name in arguments.shape or shape_names():
        shape = Shape.load(name, arguments.home)
        make_checkpoint(shape)
        if arguments.gguf:
            write_gguf(shape, shape.directory / "model-f16.gguf")


if __name__ == "__main__":
    main()
