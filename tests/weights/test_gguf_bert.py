"""BERT in GGUF files becomes the same artifact as the repository it was made of."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bert import read_settings, write_bert_gguf
from make_gguf import HIDDEN, VOCAB, finish, write_gguf

from mlc_llm.errors import UnsupportedModel
from mlc_llm.prepare.gguf_sentences import read_gguf_settings
from mlc_llm.prepare.gguf_tokenizer import write_tokenizer
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import convert_weights, usual_quantization, write_chat_config_for
from mlc_llm.prepare.sentence_transformers import SentenceSettings
from mlc_llm.text.tokenizer import Tokenizer
from mlc_llm.weights.gguf import GGUFSource

REFERENCES = Path(__file__).parents[1] / "encoder_references"
TEXTS = ["Hello, World! 12", "CAFÉ ab-c [MASK] x", "", "unaffable 東京"]


def convert(source, output):
    """Convert to exact weights; return them, and what the configuration says."""
    write_chat_config_for(source, output, quantization="q0f32")
    convert_weights(source, output, quantization="q0f32", progress=NullProgress())
    shards = sorted(output.glob("*.bin"))
    return b"".join(path.read_bytes() for path in shards), read_settings(output)


@pytest.mark.parametrize(
    ("name", "pooling", "context"), [("bert_mean", "mean", 80), ("bert_cls_odd_sizes", "cls", None)]
)
def test_a_reference_as_gguf_is_the_same_model(tmp_path, name, pooling, context):
    path = write_bert_gguf(REFERENCES / name, tmp_path / "m.gguf", pooling, context)
    weights, config = convert(REFERENCES / name, tmp_path / "original")
    found, stored = convert(path, tmp_path / "gguf")
    assert found == weights
    assert stored["model_task"] == config["model_task"] == "embedding"
    assert stored["embedding_metadata"] == config["embedding_metadata"]
    assert stored["embedding_metadata"]["pooling_strategy"] == pooling
    for content in (stored["model_config"], config["model_config"]):
        # One exact form of the activation is in these files; the references try others, too.
        content.pop("hidden_act")
    assert stored["model_config"] == config["model_config"]
    tokenizers = [Tokenizer.load(tmp_path / kind) for kind in ("original", "gguf")]
    for text in TEXTS:
        ids, expected = (t.encode(text, add_special_tokens=True) for t in tokenizers)
        assert ids == expected


def test_kinds_of_pooling(tmp_path):
    for number, name in ((1, "mean"), (2, "cls"), (3, "last")):
        path = write_small(tmp_path / f"{name}.gguf", pooling_type=number)
        assert read_gguf_settings(path) == SentenceSettings(name, True, 128)
    assert read_gguf_settings(write_small(tmp_path / "none.gguf", pooling_type=0)) is None
    with pytest.raises(UnsupportedModel, match=r"the number 9 \(bert\.pooling_type\)"):
        read_gguf_settings(write_small(tmp_path / "other.gguf", pooling_type=9))


def test_what_is_no_encoder_for_embeddings(tmp_path):
    causal = write_small(tmp_path / "causal.gguf", **{"attention.causal": True})
    with pytest.raises(UnsupportedModel, match="causal attention in BERT"):
        GGUFSource(causal)
    with pytest.raises(UnsupportedModel, match="is a BERT that scores texts"):
        GGUFSource(write_small(tmp_path / "cls.gguf", "cls.output"))


def test_positions_and_token_types_are_those_of_the_tables(tmp_path):
    path = write_small(tmp_path / "m.gguf", "position_embd", "token_types")
    config = GGUFSource(path).config
    assert (config["max_position_embeddings"], config["type_vocab_size"]) == (5, 5)
    source = GGUFSource(write_small(tmp_path / "one.gguf", token_types=np.zeros(HIDDEN, "f4")))
    assert source.config["type_vocab_size"] == 1
    assert source.shape("embeddings.token_type_embeddings.weight") == (1, HIDDEN)


def write_small(path, *tables, token_types=None, **metadata):
    """Write a file that has some tables of 5 rows and no layers."""
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    tensors |= {f"{name}.weight": np.zeros((5, HIDDEN), np.float32) for name in tables}
    if token_types is not None:
        tensors["token_types.weight"] = token_types
    return write_gguf(
        path, tensors, arch="bert", metadata={"attention.layer_norm_epsilon": 1e-12, **metadata}
    )


def test_encoders_stay_exact_unless_they_are_quantized(tmp_path):
    assert usual_quantization(write_small(tmp_path / "m.gguf")) == "q0f16"


def test_an_encoder_with_a_vocabulary_of_pieces(tmp_path):
    """XLM-RoBERTa's: its positions are BERT's once those that no token has are dropped."""
    path = tmp_path / "m.gguf"
    pieces = [("<s>", 3), ("<pad>", 3), ("</s>", 3), ("<unk>", 2)]
    pieces += [("\u2581a", 1), ("\u2581ab", 1), ("b", 1)]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_scores([0.0] * 4 + [-1.0, -1.5, -2.0])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    finish(writer)
    write_tokenizer(path, tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("a ab", add_special_tokens=True) == [0, 4, 5, 2]
