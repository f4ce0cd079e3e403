"""GGUF files that say what they are for: embeddings and reranking, beside chats."""

import gguf
import numpy as np
import pytest
from make_gguf import HIDDEN, add_value, finish, make_tensors

from mlc_llm.artifact import read_chat_config
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.prepare.gguf_sentences import read_gguf_settings
from mlc_llm.prepare.original import read_model
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for
from mlc_llm.prepare.sentence_transformers import SentenceSettings
from mlc_llm.weights.gguf import GGUFSource

SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "yes", "no"]
LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
TOKENS = [*SPECIAL, *LETTERS, "ab"]


def write(path, *, arch="qwen3", tokens=TOKENS, tied=True, tensors=None, **metadata):
    """Write a Qwen3 of one layer with a vocabulary; return it and its tensors."""
    stored = make_tensors(tied=tied)
    for part in ("q", "k"):
        stored[f"blk.0.attn_{part}_norm.weight"] = np.ones(16, np.float32)
    stored |= tensors or {}
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        **metadata,
    }
    for key, value in values.items():
        add_value(writer, f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([4] * 4 + [1] * (len(tokens) - 4))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name, tensor in stored.items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return path


def answers():
    """Return the rows of a tied head for yes and no."""
    rows = make_tensors(tied=True)["token_embd.weight"]
    return {"cls.output.weight": rows[[TOKENS.index("yes"), TOKENS.index("no")]]}


def convert(path, output):
    write_chat_config_for(path, output, quantization="q0f32")
    convert_weights(path, output, quantization="q0f32", progress=NullProgress())
    return read_chat_config(output)


def test_a_decoder_for_embeddings(tmp_path):
    path = write(tmp_path / "m.gguf", pooling_type=3)
    assert read_gguf_settings(path) == SentenceSettings("last", True, 128)
    config = convert(path, tmp_path / "out")
    assert (config.model_type, config.model_task) == ("qwen3-embedding", "embedding")
    assert config.embedding_metadata["pooling_strategy"] == "last"
    assert config.embedding_metadata["normalize"] is True
    assert read_model(write(tmp_path / "chat.gguf"))[0].name == "qwen3"


def test_a_reranker(tmp_path):
    path = write(tmp_path / "m.gguf", pooling_type=4, tensors=answers())
    config = convert(path, tmp_path / "out")
    assert (config.model_type, config.model_task) == ("qwen3", "chat")
    assert config.rerank_metadata == {"true_token_id": 4, "false_token_id": 5}
    plain = convert(write(tmp_path / "chat.gguf"), tmp_path / "chat")
    assert plain.rerank_metadata is None
    shards = [sorted((tmp_path / name).glob("*.bin")) for name in ("out", "chat")]
    assert [file.read_bytes() for file in shards[0]] == [file.read_bytes() for file in shards[1]]


def test_a_reranker_with_a_head_of_its_own(tmp_path):
    other = {"cls.output.weight": np.random.default_rng(1).normal(size=(2, HIDDEN))}
    other = {name: rows.astype(np.float32) for name, rows in other.items()}
    with pytest.raises(UnsupportedModel, match="left out but for two rows"):
        GGUFSource(write(tmp_path / "m.gguf", pooling_type=4, tensors=other))
    whole = write(tmp_path / "n.gguf", pooling_type=4, tensors=other, tied=False)
    assert "lm_head.weight" in GGUFSource(whole).names()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"classifier.output_labels": ["a", "b"]}, UnsupportedModel, "that answers \\['a', 'b'\\]"),
        ({"arch": "qwen2"}, UnsupportedModel, "of architecture qwen2"),
        ({"tokens": [*SPECIAL[:5], *LETTERS, "ab"]}, CorruptFile, "a token 'yes' or 'no'"),
        (
            {"tensors": {"cls.output.weight": np.zeros((3, HIDDEN), np.float32)}},
            CorruptFile,
            "of shape \\[3, 64\\]",
        ),
    ],
)
def test_other_rerankers_are_refused(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        GGUFSource(write(tmp_path / "m.gguf", pooling_type=4, **change))
