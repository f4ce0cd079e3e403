"""A `model_config` as MLC LLM writes it means the model that the same `config.json` means."""

from __future__ import annotations

import dataclasses

import mlc_names_later
import numpy as np
import pytest
from mlc_names_dense import MODEL_TYPES, model_config
from reference_cases import CASES, ReferenceCase

from mlc_llm.errors import CorruptFile, OptionError, UnsupportedModel
from mlc_llm.models.ministral3 import Ministral3Config
from mlc_llm.models.registry import find_family, get_family

# Limits, and what only the checkpoint's configuration or our own artifacts say.
LEFT_OUT = {
    *("context_window_size", "prefill_chunk_size", "sliding_window_size", "layer_types"),
    *("max_batch_size", "max_window_layers", "normalized_head", "rope_scaling"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn"),
}
DENSE = [case for case in CASES if case.model_type in MODEL_TYPES]
LATER = [case for case in CASES if case.model_type in mlc_names_later.MODEL_TYPES]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_fields_of_mlc_llm_mean_the_same(case: ReferenceCase) -> None:
    config = case.config()
    family = find_family(config)
    ours = dataclasses.asdict(family.config_from_huggingface(config))
    limits = {"context_window_size": 256, "prefill_chunk_size": 256, "max_batch_size": 128}
    # Some of their classes take the base from fields of their own, and none knows ALiBi.
    base = {"position_embedding_base": ours["position_embedding_base"]}
    alibi = {"alibi": ours.get("alibi", False)}
    theirs = family.config_from_json({**model_config(config), **base, **alibi, **limits})
    found = dataclasses.asdict(theirs)
    assert {k: v for k, v in found.items() if k not in LEFT_OUT} == {
        k: v for k, v in ours.items() if k not in LEFT_OUT
    }
    ropes = [config.ropes for config in (theirs, family.config_from_huggingface(case.config()))]
    for found_rope, rope in zip(*ropes, strict=True):
        assert np.array_equal(found_rope.inverse_frequencies(), rope.inverse_frequencies())
        assert found_rope.table_scale == rope.table_scale


@pytest.mark.parametrize("case", DENSE + LATER, ids=str)
def test_our_own_fields_read_back(case: ReferenceCase) -> None:
    family = find_family(case.config())
    config = family.config_from_huggingface(case.config())
    assert family.config_from_json(config.to_json()) == config
    layers = range(config.num_hidden_layers)
    again = family.config_from_json(config.to_json())
    assert [again.window_of(i) for i in layers] == [config.window_of(i) for i in layers]
    assert [again.rope_of(i) for i in layers] == [config.rope_of(i) for i in layers]


def test_window_that_was_switched_off_stays_off() -> None:
    case = next(case for case in DENSE if case.name == "gemma3_text")
    family = find_family(case.config())
    config = family.config_from_huggingface(case.config())
    assert config.window_of(0) == 8
    whole = config.with_overrides({"sliding_window_size": -1})
    again = family.config_from_json(whole.to_json())
    assert [again.window_of(layer) for layer in range(3)] == [-1, -1, -1]


def test_text_part_beside_a_model_of_images() -> None:
    """Published configurations leave out what is usual; MLC LLM puts -1 for limits of the text."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    published = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    family = find_family(published)
    config = family.config_from_huggingface(published)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert heads == (8, 4, 256) and config.vocab_size == 262208
    assert config.context_window_size == 131072 and config.tie_word_embeddings
    assert [config.window_of(layer) for layer in (4, 5, 6)] == [1024, -1, 1024]
    assert [config.rope_of(layer) for layer in (4, 5, 6)] == [1, 0, 1]
    stored = {**text, "context_window_size": 8192, "sliding_window_size": 512, "rope_scaling": 0}
    limits = {"context_window_size": -1, "sliding_window_size": -1, "vocab_size": 262145}
    theirs = family.config_from_json({"text_config": stored, **limits})
    assert (theirs.context_window_size, theirs.vocab_size) == (8192, 262145)
    assert theirs.window_of(0) == 512 and theirs.rope_scaling is None


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen", {"no_bias": False}, "no_bias=False is not supported"),
        ("qwen", {"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        ("qwen", {"intermediate_size": 81}, "81 is odd"),
        ("chatglm", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True"),
    ],
)
def test_what_is_not_computed_is_refused(
    model_type: str, fields: dict[str, object], message: str
) -> None:
    config = next(case for case in DENSE if case.model_type == model_type).config()
    with pytest.raises(UnsupportedModel, match=message):
        get_family(model_type).config_from_huggingface({**config, **fields})


def test_ministral_beside_a_model_of_images() -> None:
    """What the text part says of its output layer counts, not a default beside it."""
    config = next(case for case in DENSE if case.name == "ministral3").config()
    family = find_family(config)
    for tied in (True, False):
        text = {**config["text_config"], "tie_word_embeddings": tied}
        given = {**config, "text_config": text, "tie_word_embeddings": not tied}
        assert family.config_from_huggingface(given).tie_word_embeddings is tied
    found = family.config_from_huggingface(config)
    assert isinstance(found, Ministral3Config)
    assert found.query_scale is not None and found.query_scale.period == 8
    short = found.with_overrides({"context_window_size": 8})
    assert short.query_scale is None
    # Mistral Small 3 has no such scaling.
    plain = {**config["text_config"], "rope_parameters": {"rope_theta": 1e9}}
    plain_config = family.config_from_huggingface({**config, "text_config": plain})
    assert isinstance(plain_config, Ministral3Config) and plain_config.query_scale is None
    rope = {**config["text_config"]["rope_parameters"], "llama_4_scaling_beta": "much"}
    with pytest.raises(CorruptFile, match="llama_4_scaling_beta='much'"):
        family.config_from_huggingface({**config, "text_config": {**text, "rope_parameters": rope}})


def test_qwen_ends_where_it_was_trained() -> None:
    config = {**next(case for case in DENSE if case.name == "qwen").config()}
    config.update(max_position_embeddings=256, seq_length=64, use_logn_attn=False)
    family = get_family("qwen")
    bounded = family.config_from_huggingface({**config, "use_dynamic_ntk": True})
    assert bounded.context_window_size == 64
    with pytest.raises(OptionError, match="beyond 64 tokens this model needs dynamic NTK"):
        bounded.with_overrides({"context_window_size": 65})
    free = family.config_from_huggingface({**config, "use_dynamic_ntk": False})
    assert free.context_window_size == 256


def test_layer_types_must_fit_the_layers() -> None:
    config = next(case for case in DENSE if case.name == "gemma2").config()
    for kinds in (["full_attention"], ["full_attention", "linear", "full_attention"]):
        with pytest.raises(CorruptFile, match="layer_types must name sliding_attention"):
            get_family("gemma2").config_from_huggingface({**config, "layer_types": kinds})
