"""Encoders and Qwen3-Embedding, compiled, against the states that transformers computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import CASES, REFERENCES, TinyEncoders, embed, pooled, read_inputs
from numpy.typing import NDArray
from numpy_bert import bert_states
from numpy_model import read_weights
from tiny_models import INT8_OPT, relative_error

from mlc_llm.artifact import read_chat_config, read_tensor_index
from mlc_llm.compiler.compile import CompileOptions, compile_model
from mlc_llm.errors import ContextTooLong, CorruptFile, OptionError, UnsupportedModel
from mlc_llm.models.registry import get_family
from mlc_llm.prepare.resolve import read_model
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.group import dequantize_group
from mlc_llm.quantization.schemes import get_scheme

pytestmark = pytest.mark.cpu

BERTS = [name for name in CASES if name.startswith("bert")]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = TinyEncoders(tmp_path_factory.mktemp("encoders"))
    yield made
    made.close()


@pytest.mark.parametrize("name", CASES)
def test_vectors_equal_the_reference(encoders: TinyEncoders, name: str) -> None:
    model = encoders.model(name)
    fitting = [
        (ids, states) for ids, states in read_inputs(name) if len(ids) <= model.max_input_len
    ]
    assert len(fitting) >= 3
    found = embed(model, [ids for ids, _ in fitting])
    for vector, (_, states) in zip(found, fitting, strict=True):
        assert relative_error(vector, pooled(name, states)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_vector_does_not_depend_on_its_company(encoders: TinyEncoders, name: str) -> None:
    model = encoders.model(name)
    draw = np.random.default_rng(7)
    lengths = [1, 60, 2, 16, 17, 31, 48, 5]
    inputs = [draw.integers(5, 131, length).tolist() for length in lengths]
    together = embed(model, inputs)
    for tokens, vector in zip(inputs, together, strict=True):
        np.testing.assert_array_equal(embed(model, [tokens])[0], vector)
    np.testing.assert_array_equal(embed(model, inputs[::-1])[::-1], together)


@pytest.mark.parametrize("name", BERTS)
def test_every_token_sees_the_whole_text(encoders: TinyEncoders, name: str) -> None:
    model = encoders.model(name)
    before = [7] * 40
    first, last = embed(model, [before, [*before[:-1], 9]])
    assert relative_error(last, first) > 1e-3


def stored_weights(name: str, artifact: Path, quantization: str) -> dict[str, NDArray[Any]]:
    """Return the artifact's weights, dequantized, by Hugging Face's names without prefix."""
    scheme = get_scheme(quantization)
    family, config = read_model(REFERENCES / name)
    index = read_tensor_index(artifact)
    originals = read_weights(REFERENCES / name)
    weights: dict[str, NDArray[Any]] = {}
    for item in plan_parameters(family, config, scheme):
        arrays = [index.read(spec.name) for spec in item.outputs]
        value = arrays[0]
        if len(arrays) > 1:
            is_transposed = scheme.layout == "KN" and "_embeddings" not in item.name
            value = dequantize_group(*arrays, scheme, item.shape[1], transposed=is_transposed)
        sources = item.rule.sources
        parts = [originals.get(f"bert.{s}", originals.get(s)) for s in sources]
        sizes = [part.shape[0] for part in parts]
        weights.update(zip(sources, np.split(value, np.cumsum(sizes)[:-1]), strict=True))
    return weights


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("bert_mean", "q4f16_1"),
        ("bert_mean", "q8f16_1"),
        ("bert_mean", "q0f16"),
        ("bert_cls_odd_sizes", "q4f16_0"),
        ("bert_cls_odd_sizes", "q0bf16"),
    ],
)
def test_a_quantized_model_is_the_dequantized_one(
    encoders: TinyEncoders, name: str, quantization: str
) -> None:
    artifact = encoders.artifact(name, quantization)
    weights = stored_weights(name, artifact, quantization)
    config = json.loads((REFERENCES / name / "config.json").read_text())
    tokens = read_inputs(name)[0][0]
    expected = pooled(name, bert_states(config, weights, tokens))
    found = embed(encoders.model(name, quantization), [tokens])[0]
    assert relative_error(found, expected) < 1e-4


def test_rounded_activations_keep_the_direction(encoders: TinyEncoders) -> None:
    tokens, states = read_inputs("bert_mean")[0]
    found = embed(encoders.model("bert_mean", "q8f16_1", INT8_OPT), [tokens])[0]
    assert found @ pooled("bert_mean", states) > 0.99


def test_the_second_opinion_agrees_with_transformers() -> None:
    for name in BERTS:
        config = json.loads((REFERENCES / name / "config.json").read_text())
        weights = {
            key.removeprefix("bert."): value
            for key, value in read_weights(REFERENCES / name).items()
        }
        for tokens, states in read_inputs(name):
            assert relative_error(bert_states(config, weights, tokens), states) < 3e-6


def test_what_artifacts_say_of_their_vectors(encoders: TinyEncoders) -> None:
    found = {name: read_chat_config(encoders.artifact(name)) for name in CASES}
    assert {name: config.embedding_metadata for name, config in found.items()} == {
        "bert_mean": {"model_type": "encoder", "pooling_strategy": "mean", "normalize": True},
        "bert_cls_odd_sizes": {
            "model_type": "encoder",
            "pooling_strategy": "cls",
            "normalize": True,
        },
        "qwen3_embedding": {"model_type": "decoder", "pooling_strategy": "last", "normalize": True},
    }
    assert {config.model_task for config in found.values()} == {"embedding"}
    assert [found[name].context_window_size for name in CASES] == [80, 75, 256]
    assert [found[name].model_type for name in CASES] == ["bert", "bert", "qwen3-embedding"]


def test_texts_are_wrapped_and_bounded(encoders: TinyEncoders) -> None:
    model = encoders.model("bert_mean")
    words = " ".join("abc" for _ in range(40))
    assert model.token_ids("ab")[0] == 2 and model.token_ids("ab")[-1] == 3
    assert model.max_input_len == 80 < len(model.token_ids(words))
    with pytest.raises(ContextTooLong, match="the model bert_mean takes 80; split it"):
        embed(model, [model.token_ids(words)])
    cut = model.token_ids(words, 80)
    assert len(cut) == 80 and cut[-1] == 3
    assert embed(model, [cut]).shape == (1, 32)
    # Qwen3's tokenizer here adds no end, which its vectors are made of.
    assert encoders.model("qwen3_embedding").token_ids("ab")[-1] == 2


def test_a_model_for_vectors_cannot_chat(encoders: TinyEncoders) -> None:
    for name in ("bert_mean", "qwen3_embedding"):
        config = read_chat_config(encoders.artifact(name))
        with pytest.raises(OptionError, match="is for embeddings only"):
            compile_model(config, CompileOptions("cpu", "O2", {"model_task": "chat"}), print)


def test_the_library_says_how_vectors_are_made(encoders: TinyEncoders) -> None:
    """MLC LLM's older artifacts say nothing of pooling, nor that they are for embeddings."""
    import dataclasses

    config = read_chat_config(encoders.artifact("bert_cls_odd_sizes"))
    old = dataclasses.replace(config, model_task="chat", embedding_metadata=None)
    compiled = compile_model(old, CompileOptions("cpu", "O0"), lambda _: None)
    assert compiled.metadata.model_task == "embedding"
    assert compiled.metadata.embedding_metadata == config.embedding_metadata
    assert compiled.metadata.kv_cache.num_layers == 1


def test_configurations_that_cannot_be_honoured() -> None:
    family = get_family("bert")
    config = json.loads((REFERENCES / "bert_mean" / "config.json").read_text())
    for changes, words in [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "mish"),
    ]:
        with pytest.raises(UnsupportedModel, match=words):
            family.config_from_huggingface({**config, **changes})
    whole = family.config_from_huggingface(config)
    with pytest.raises(OptionError, match="97 is more than the 96 positions"):
        whole.with_overrides({"context_window_size": 97})
    with pytest.raises(OptionError, match="sliding_window_size=16 has no meaning"):
        whole.with_overrides({"sliding_window_size": 16})
    with pytest.raises(CorruptFile, match="type_vocab_size is -1"):
        family.config_from_huggingface({**config, "type_vocab_size": -1})
    # MLC LLM writes the table's length as the context and has no fields of ours.
    theirs = {
        **{"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
        **{"context_window_size": 96, "prefill_chunk_size": 96, "head_dim": 0},
    }
    read = get_family("bert-bge").config_from_json(theirs)
    assert (read.max_position_embeddings, read.type_vocab_size) == (96, 2)
    assert (read.head_dim, read.rms_norm_eps) == (8, 1e-12)
