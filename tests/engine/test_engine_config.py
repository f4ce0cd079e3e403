"""The engine's settings: what is accepted, what is refused and why, and `--overrides`."""

from __future__ import annotations

import dataclasses

import pytest

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.config import (
    SERVE_OVERRIDES,
    EngineConfig,
    apply_overrides,
    compile_overrides,
)
from mlc_llm.errors import OptionError

MODEL = ChatConfig(
    model_type="llama",
    quantization="q4f16_1",
    model_config={"max_batch_size": 128},
    vocab_size=512,
    context_window_size=2048,
    prefill_chunk_size=512,
    conv_template={},
)
# The fields of MLC LLM's class, in its order.
ORIGINAL = (
    "model model_lib additional_models mode tensor_parallel_shards pipeline_parallel_stages opt "
    "gpu_memory_utilization kv_cache_page_size max_num_sequence max_total_sequence_length "
    "max_single_sequence_length prefill_chunk_size sliding_window_size attention_sink_size "
    "max_history_size kv_state_kind speculative_mode spec_draft_length spec_tree_width "
    "prefix_cache_mode prefix_cache_max_num_recycling_seqs prefill_mode verbose"
).split()


def test_the_fields_of_the_original_are_there() -> None:
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    assert names[: len(ORIGINAL)] == ORIGINAL
    ours = ["kv_cache_dtype", "max_queued_requests", "request_timeout_s"]
    assert names[len(ORIGINAL) :] == [*ours, "tool_parser", "reasoning_parser", "model_task"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "server", "max_num_sequence": 16, "gpu_memory_utilization": 0.5},
        {"additional_models": [], "tensor_parallel_shards": 1, "pipeline_parallel_stages": 1},
        {"max_history_size": 8, "kv_cache_page_size": 16, "speculative_mode": "disable"},
        {"prefix_cache_mode": "disable", "prefill_mode": "chunked", "verbose": False},
        {"prefix_cache_max_num_recycling_seqs": -1, "request_timeout_s": 0.5},
        {"sliding_window_size": -1, "attention_sink_size": 0, "gpu_memory_utilization": 1},
    ],
)
def test_accepted(settings) -> None:
    config = EngineConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", "x", "first argument"),
        ("model_lib", "x.so", "--model-lib"),
        ("additional_models", ["draft"], "speculation is|draft models"),
        ("tensor_parallel_shards", 2, "one device only"),
        ("pipeline_parallel_stages", 2, "one device only"),
        ("kv_cache_page_size", 32, "pages of 16"),
        ("kv_state_kind", "rnn_state", "follows from the model"),
        ("speculative_mode", "eagle", "speculation is not supported"),
        ("spec_draft_length", 4, "speculation is not supported"),
        ("spec_tree_width", 2, "speculation is not supported"),
        ("mode", "fast", "local, interactive, server"),
        ("speculative_mode", "magic", "one of disable"),
        ("prefix_cache_mode", "tree", "disable, radix"),
        ("prefill_mode", None, "hybrid, chunked"),
        ("max_num_sequence", 0, "at least 1"),
        ("max_num_sequence", True, "at least 1"),
        ("max_num_sequence", 4.0, "at least 1"),
        ("max_total_sequence_length", -5, "at least 1"),
        ("max_single_sequence_length", 1, "at least 2"),
        ("prefill_chunk_size", "512", "whole number"),
        ("prefix_cache_max_num_recycling_seqs", -2, "at least -1"),
        ("max_queued_requests", None, "at least 0"),
        ("gpu_memory_utilization", 0, "above 0 and at most 1"),
        ("gpu_memory_utilization", 1.1, "above 0 and at most 1"),
        ("gpu_memory_utilization", float("nan"), "above 0 and at most 1"),
        ("gpu_memory_utilization", "0.9", "above 0 and at most 1"),
        ("request_timeout_s", 0, "seconds above 0"),
        ("request_timeout_s", float("inf"), "seconds above 0"),
        ("opt", 2, "text"),
        ("kv_cache_dtype", "", "text"),
        ("verbose", 1, "true or false"),
    ],
)
def test_refused_by_name(name, value, words) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        EngineConfig(**{name: value})
    assert str(caught.value).startswith(name) and repr(value) in str(caught.value)


def test_overrides_go_before_the_config() -> None:
    config = EngineConfig(mode="server", max_num_sequence=4, prefix_cache_mode="disable")
    changed = apply_overrides(
        config,
        {
            "max_num_sequence": 8,
            "max_total_seq_length": 4096,
            "context_window_size": 1024,
            "prefix_cache_mode": "radix",
            "opt": "O3",
        },
    )
    assert changed == EngineConfig(
        mode="server",
        max_num_sequence=8,
        max_total_sequence_length=4096,
        max_single_sequence_length=1024,
        opt="O3",
    )
    assert config.max_num_sequence == 4


def test_every_override_is_honoured_or_refused() -> None:
    """Another value than the default either shows in the config or is refused by its name."""
    samples = {int: 3, float: 0.5, str: "disable"}
    special = {"prefill_mode": "chunked", "kv_cache_dtype": "int8", "opt": "O1"}
    refused = []
    for key, kind in SERVE_OVERRIDES.items():
        try:
            config = apply_overrides(EngineConfig(), {key: special.get(key, samples[kind])})
        except OptionError as error:
            assert key in str(error)
            refused.append(key)
        else:
            assert config != EngineConfig(), key
    assert refused == [
        "tensor_parallel_shards",
        "pipeline_parallel_stages",
        "spec_draft_length",
        "spec_tree_width",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"max_batch": 3}, "unknown key 'max_batch'; known: max_num_sequence"),
        ({"context_window_size": 0}, "context_window_size must be .* at least 2, it is 0"),
        ({"max_total_seq_length": 0}, "max_total_seq_length must be"),
        ({"prefill_mode": "slow"}, "prefill_mode must be one of hybrid, chunked"),
    ],
)
def test_bad_overrides(overrides, words) -> None:
    with pytest.raises(OptionError, match=f"^--overrides: {words}"):
        apply_overrides(EngineConfig(), overrides)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"max_single_sequence_length": 1024, "max_num_sequence": 128}, {}),
        ({"max_single_sequence_length": 4096}, {"context_window_size": 4096}),
        ({"max_num_sequence": 200}, {"max_batch_size": 200}),
        ({"prefill_chunk_size": 1024}, {"prefill_chunk_size": 1024}),
        (
            {"sliding_window_size": 256, "attention_sink_size": 4, "kv_cache_dtype": "int8"},
            {"sliding_window_size": 256, "attention_sink_size": 4, "kv_cache_dtype": "int8"},
        ),
    ],
)
def test_only_what_needs_another_library_is_compiled(settings, expected) -> None:
    assert compile_overrides(EngineConfig(**settings), MODEL) == expected


def test_what_the_artifact_does_not_say_is_compiled() -> None:
    model = dataclasses.replace(MODEL, model_config={})
    assert compile_overrides(EngineConfig(max_num_sequence=4), model) == {"max_batch_size": 4}
