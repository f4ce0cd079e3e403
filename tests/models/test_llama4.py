"""Configurations of Llama 4: what published ones leave out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from reference_cases import get_case

from mlc_llm.errors import CorruptFile, MlcError, OptionError, UnsupportedModel
from mlc_llm.models.llama4 import Llama4Config
from mlc_llm.models.registry import find_family


def read(case: str, **edits: Any) -> Llama4Config:
    config = {**get_case(case).config(), **edits}
    found = find_family(config).config_from_huggingface(config)
    assert isinstance(found, Llama4Config)
    return found


def test_text_part_beside_a_model_of_images() -> None:
    """As published: 16 experts in every layer, every fourth layer without positions."""
    text = {
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "max_position_embeddings": 10485760,
        "no_rope_layers": [],
        "attn_temperature_tuning": 4,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    }
    published = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    config = find_family(published).config_from_huggingface(published)
    assert isinstance(config, Llama4Config)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (8, 128, 202048)
    assert [config.rope_of(layer) for layer in range(2, 8)] == [0, None, 0, 0, 0, None]
    assert [config.window_of(layer) for layer in range(2, 6)] == [8192, -1, 8192, 8192]
    assert all(config.has_experts(layer) for layer in range(48))
    assert config.query_scale is not None and config.query_scale.period == 8192
    # Within one chunk there is nothing to cut, and no query grows.
    short = config.with_overrides({"context_window_size": 8191})
    assert [short.window_of(layer) for layer in range(4)] == [-1] * 4
    assert short.query_scale is None
    assert type(config).from_json(config.to_json()) == config


def test_limits_of_the_whole_win_in_a_stored_configuration() -> None:
    text = read("llama4_text").to_json()
    stored = {"text_config": text, "context_window_size": 128, "sliding_window_size": -1}
    config = Llama4Config.from_json(stored)
    assert config.context_window_size == 128 and config.num_local_experts == 5
    assert [config.has_experts(layer) for layer in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"no_rope_layers": [1, 0]}, CorruptFile, r"no_rope_layers must be a list of 4"),
        (
            {"layer_types": ["sliding_attention"] * 4},
            CorruptFile,
            "layer_types must name chunked_attention or full",
        ),
        ({"moe_layers": [7]}, CorruptFile, r"moe_layers is \[7\]"),
        ({"attention_chunk_size": 0}, CorruptFile, "attention_chunk_size is 0"),
        ({"floor_scale": 0.5}, CorruptFile, "floor_scale is 0.5; it is a number of tokens"),
        ({"num_experts_per_tok": 6}, CorruptFile, "a token has 6 experts, the model 5"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
            UnsupportedModel,
            "use_qk_norm is not supported with rope_scaling",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    edit: dict[str, Any], error: type[MlcError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read("llama4_text", **edit)


def test_chunks_are_not_windows() -> None:
    with pytest.raises(OptionError, match="sliding_window_size=64 is not supported"):
        read("llama4_text").with_overrides({"sliding_window_size": 64})
