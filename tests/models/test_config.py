"""Model configurations: what is read, derived and refused; and which family takes a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from reference_cases import CASES

from mlc_llm.errors import CorruptFile, OptionError, UnsupportedModel
from mlc_llm.models.registry import FAMILIES, find_family, get_family
from mlc_llm.nn.rope import RopeConfig

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def read(family: str = "llama", **changes: Any) -> Any:
    return get_family(family).config_from_huggingface({**BASE, **changes})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_written_is_read_back(case) -> None:
    family = find_family(case.config())
    assert family.name == case.model_type
    config = family.config_from_huggingface(case.config())
    assert family.config_from_json(config.to_json()) == config


def test_derived_fields() -> None:
    config = read()
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.qkv_features == 3 * 64
    assert (config.context_window_size, config.prefill_chunk_size) == (128, 128)
    assert config.position_embedding_base == 10000.0
    assert read(max_position_embeddings=100_000).prefill_chunk_size == 2048
    assert read(head_dim=24, num_key_value_heads=2).qkv_features == (4 + 2 * 2) * 24


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": None}, CorruptFile, "lacks hidden_size"),
        ({"vocab_size": "many"}, CorruptFile, "vocab_size must be a positive int, is 'many'"),
        ({"num_hidden_layers": 0}, CorruptFile, "num_hidden_layers"),
        ({"num_hidden_layers": True}, CorruptFile, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, UnsupportedModel, "4 attention heads cannot share 3"),
        ({"head_dim": 15}, UnsupportedModel, "even number of dimensions.*15"),
        ({"hidden_act": "mish"}, UnsupportedModel, "activation 'mish' is not supported.*silu"),
        ({"rope_scaling": {"type": "alibi"}}, UnsupportedModel, "'alibi'.*llama3"),
        ({"rope_scaling": {"type": "yarn"}}, CorruptFile, "'yarn' has missing.*factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, CorruptFile, "'linear' has"),
        ({"rope_theta": "big"}, CorruptFile, "rotary embedding"),
        ({"partial_rotary_factor": 1.5}, CorruptFile, "partial_rotary_factor is 1.5"),
    ],
)
def test_bad_configurations_are_refused(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        read(**changes)


def test_windows_by_layer() -> None:
    assert read("mistral", sliding_window=None).window_of(0) == -1
    assert read("mistral", sliding_window=8).window_of(1) == 8
    qwen = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    config = read("qwen2", **qwen)
    assert [config.window_of(layer) for layer in (0, 1)] == [-1, 8]
    assert read("qwen2", **{**qwen, "use_sliding_window": False}).window_of(1) == -1


def test_overrides_replace_limits() -> None:
    config = read().with_overrides({"context_window_size": 64, "sliding_window_size": -1})
    assert (config.context_window_size, config.prefill_chunk_size) == (64, 64)
    assert read().with_overrides({"prefill_chunk_size": 16}).prefill_chunk_size == 16
    assert read().with_overrides({"kv_cache_dtype": "float32"}).kv_dtype("float16") == "float32"


def test_the_context_of_a_library_decides_scalings_of_long_texts() -> None:
    """As docs/checkpoints.md says; transformers decides by each text, with the same numbers."""
    factors = {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
    plain = read().ropes[0].inverse_frequencies()

    def rope_of(context: int, **scaling: Any) -> RopeConfig:
        model = read(max_position_embeddings=256, rope_scaling=scaling)
        made = model.with_overrides({"context_window_size": context})
        # As an artifact has it.
        rope: RopeConfig = get_family("llama").config_from_json(made.to_json()).ropes[0]
        return rope

    for context, factor in [(64, 1.5), (65, 4.0), (256, 4.0)]:
        found = rope_of(
            context, rope_type="longrope", **factors, original_max_position_embeddings=64
        )
        np.testing.assert_allclose(found.inverse_frequencies(), plain / factor, rtol=1e-6)
        # By the lengths of the model: 256 / 64 = 4.
        assert found.table_scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    for context, growth in [(128, 1), (256, 1), (512, 2 * 2 - 1)]:
        base = 10000.0 * growth ** (16 / 14)
        found = rope_of(context, rope_type="dynamic", factor=2.0)
        expected = base ** (-np.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(found.inverse_frequencies(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float16")],
)
def test_dtype_of_the_cache_follows_the_model(dtype, expected) -> None:
    assert read().kv_dtype(dtype) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 8}, "'hidden_size' is not known; known: .*context_window_size"),
        ({"context_window_size": 0}, "context_window_size=0 must be a positive whole number"),
        ({"context_window_size": -1}, "context_window_size=-1"),
        ({"context_window_size": "8k"}, "context_window_size='8k'"),
        ({"max_batch_size": 1.5}, "max_batch_size=1.5"),
        ({"max_batch_size": True}, "max_batch_size=True"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype='int4' is not one of auto, float16"),
    ],
)
def test_bad_overrides_are_refused(overrides, message) -> None:
    with pytest.raises(OptionError, match=message):
        read().with_overrides(overrides)


def test_artifacts_of_others() -> None:
    """MLC LLM leaves fields out or writes -1 where it means a default."""
    written = {
        **{name: value for name, value in BASE.items() if name != "architectures"},
        "context_window_size": -1,
        "prefill_chunk_size": -1,
        "num_key_value_heads": 0,
        "head_dim": 0,
        "position_embedding_base": 0,
        "rope_theta": 500000.0,
        "a_field_of_theirs": 1,
    }
    config = get_family("llama").config_from_json(written)
    assert (config.context_window_size, config.prefill_chunk_size) == (32768, 2048)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.position_embedding_base == 500000.0
    del written["intermediate_size"]
    with pytest.raises(CorruptFile, match="lacks intermediate_size; run gen_config again"):
        get_family("llama").config_from_json(written)


def test_family_is_found_by_architecture_or_name() -> None:
    assert find_family({"architectures": ["Qwen2ForCausalLM"]}).name == "qwen2"
    assert find_family({"model_type": "mistral"}).name == "mistral"
    qwen3 = {"architectures": ["Qwen3ForCausalLM"]}
    assert find_family(qwen3).name == "qwen3"
    assert find_family(qwen3, task="embedding").name == "qwen3-embedding"
    assert find_family({"architectures": ["BertModel"]}).name == "bert"
    assert find_family({"architectures": ["Other"]}, "llama") is FAMILIES["llama"]
    with pytest.raises(UnsupportedModel, match=r"MambaForCausalLM is not supported.*Llama"):
        find_family({"architectures": ["MambaForCausalLM"], "model_type": "llama"})
    with pytest.raises(UnsupportedModel, match="not named is not supported"):
        find_family({})
    with pytest.raises(OptionError, match=r"'electra' is not known; known: .*llama.*qwen2"):
        find_family({}, "electra")


def test_fused_parameters_have_their_parts() -> None:
    rule = get_family("qwen2").rule_for("model.layers.3.self_attn.c_attn.bias", read("qwen2"))
    assert rule.sources == tuple(f"model.layers.3.self_attn.{part}_proj.bias" for part in "qkv")
    rule = get_family("llama").rule_for("model.layers.0.mlp.gate_up_proj.weight", read())
    assert rule.sources == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )
    assert get_family("llama").rule_for("lm_head.weight", read()).sources == ("lm_head.weight",)
