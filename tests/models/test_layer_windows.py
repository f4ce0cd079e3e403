"""Configurations as published of families with windows in some layers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.models.registry import get_family

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "vocab_size": 131,
    "max_position_embeddings": 65536,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
}


def layers(family: str, fields: dict[str, Any]) -> list[tuple[int, int | None]]:
    """Return the window and the rotary embedding of each layer."""
    config = get_family(family).config_from_huggingface({**SIZES, **fields})
    again = get_family(family).config_from_json(config.to_json())
    found = [(again.window_of(layer), again.rope_of(layer)) for layer in range(8)]
    assert found == [(config.window_of(layer), config.rope_of(layer)) for layer in range(8)]
    return found


def test_every_fourth_layer_of_smollm3_has_no_positions() -> None:
    usual = {"sliding_window": None, "use_sliding_window": False}
    expected = [(-1, 0), (-1, 0), (-1, 0), (-1, None)] * 2
    assert layers("smollm3", usual) == expected
    assert layers("smollm3", {**usual, "no_rope_layers": [1, 1, 1, 0] * 2}) == expected
    windows = {"sliding_window": 512, "use_sliding_window": True}
    assert layers("smollm3", windows) == [(-1, 0), (-1, 0), (-1, 0), (512, None)] * 2
    config = get_family("smollm3").config_from_huggingface(SIZES)
    assert config.tie_word_embeddings and config.position_embedding_base == 2e6


def test_layers_of_cohere2_without_windows_have_no_positions() -> None:
    fields = {"sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 50000}
    assert layers("cohere2", fields) == [(4096, 0), (4096, 0), (4096, 0), (-1, None)] * 2


def test_exaone4_takes_letters_and_small_models_have_positions_everywhere() -> None:
    letters = {"sliding_window": 4096, "sliding_window_pattern": "LLLG"}
    local = (4096, 0)
    assert layers("exaone4", letters) == [local, local, local, (-1, None)] * 2
    last = {**letters, "sliding_window_pattern": "LLL"}
    assert layers("exaone4", last) == [local] * 7 + [(-1, None)]
    small = {"sliding_window": None, "sliding_window_pattern": None}
    assert layers("exaone4", small) == [(-1, 0)] * 8


def test_windows_of_olmo3_have_the_plain_rotary_embedding() -> None:
    old = {"rope_theta": 500000, "rope_scaling": YARN, "sliding_window": 4096}
    assert layers("olmo3", old) == [(4096, 1), (4096, 1), (4096, 1), (-1, 0)] * 2
    config = get_family("olmo3").config_from_huggingface({**SIZES, **old})
    whole, local = config.ropes
    assert (whole.base, local.base) == (500000.0, 500000.0)
    assert whole.scaling is not None and local.scaling is None
    assert whole.table_scale == pytest.approx(1.2079441541679836) and local.table_scale == 1


def test_a_window_that_is_switched_off_leaves_positions_as_they_are() -> None:
    for family in ("cohere2", "exaone4", "olmo3"):
        config = get_family(family).config_from_huggingface({**SIZES, "sliding_window": 4096})
        whole = config.with_overrides({"sliding_window_size": -1})
        again = get_family(family).config_from_json(whole.to_json())
        assert [again.window_of(layer) for layer in range(8)] == [-1] * 8
        assert [again.rope_of(i) for i in range(8)] == [config.rope_of(i) for i in range(8)]


@pytest.mark.parametrize(
    ("family", "fields", "error", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, CorruptFile, r"must be a list of 8, is \[1, 0\]"),
        ("smollm3", {"no_rope_layer_interval": -1}, CorruptFile, "interval is -1; it is 1 or"),
        ("cohere2", {"layer_types": ["linear"] * 8}, CorruptFile, "must name sliding_attention"),
        ("olmo3", {"sliding_window_pattern": -4}, CorruptFile, "sliding_window_pattern is -4"),
        ("granite", {"logits_scaling": 0}, CorruptFile, "logits_scaling is 0"),
        (
            "granitemoehybrid",
            {"layer_types": ["mamba", "attention"] * 4},
            UnsupportedModel,
            "layers of kind mamba are not supported; take a Granite 4 model",
        ),
        ("granitemoehybrid", {}, UnsupportedModel, "layers of kind mamba"),
        (
            "granitemoehybrid",
            {"layer_types": ["attention"] * 8, "position_embedding_type": "alibi"},
            UnsupportedModel,
            "position_embedding_type 'alibi' is not supported",
        ),
        (
            "granitemoe",
            {"num_local_experts": 2, "num_experts_per_tok": 3},
            CorruptFile,
            "a token has 3 experts, the model 2",
        ),
        ("dots1", {"attention_bias": True}, UnsupportedModel, "dots.llm1 with biases"),
        ("granitemoe", {}, CorruptFile, "without experts shared_intermediate_size"),
    ],
)
def test_what_is_refused(
    family: str, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_family(family).config_from_huggingface({**SIZES, **fields})


def test_a_fixed_dynamic_scaling_stretches_the_base() -> None:
    published = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32}
    fields = {**SIZES, "head_dim": 128, "rope_theta": 10000.0, "rope_scaling": published}
    config = get_family("hunyuan_v1_dense").config_from_huggingface(fields)
    assert config.position_embedding_base == pytest.approx(10000 * 1000 ** (128 / 126))
    assert config.rope_scaling is None


def test_granite_4_of_attention_alone_has_positions_if_it_says_so() -> None:
    fields = {
        "layer_types": ["attention"] * 8,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
    }
    assert layers("granitemoehybrid", {**fields, "position_embedding_type": "rope"})[0] == (-1, 0)
    for kind in ("nope", None):
        found = layers("granitemoehybrid", {**fields, "position_embedding_type": kind})
        assert found == [(-1, None)] * 8
