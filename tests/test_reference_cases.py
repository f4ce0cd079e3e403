"""The stored references follow from their checkpoints, and each feature shows in them.

An independent NumPy forward pass is the judge.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy_model import read_weights
from reference_cases import CASES, REFERENCES, ReferenceCase, get_case
from second_opinion import forward

_MINISTRAL_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
# What must move the logits if it is left out, and by config edits that leave it out.
FEATURES = [
    ("llama_gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    ("llama_rope_linear_old_config", {"rope_scaling": None}),
    ("llama_rope_llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama_rope_llama3_tied_old_config", {"rope_scaling": None}),
    ("mistral_sliding_window", {"sliding_window": None}),
    ("mistral_sliding_window", {"sliding_window": 9}),
    ("qwen2_odd_sizes_old_config", {"use_sliding_window": True}),
    ("qwen2_gqa", {"rms_norm_eps": 1e-2}),
    ("gpt2", {"layer_norm_epsilon": 1e-2}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox_sequential", {"use_parallel_residual": True}),
    ("gptj", {"rotary_dim": 4}),
    ("mixtral", {"sliding_window": None}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_5", {"rms_norm_eps": 1e-2}),
    (
        "qwen3_5",
        {"rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
    ),
    ("rwkv5", {"head_size_divisor": 1}),
    ("rwkv5", {"layer_norm_epsilon": 1e-2}),
    ("rwkv6", {"layer_norm_epsilon": 1e-2}),
    ("qwen3_bias_window_old_config", {"max_window_layers": 0}),
    ("gemma2", {"attn_logit_softcapping": 50.0}),
    ("gemma2", {"final_logit_softcapping": 30.0}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2_old_config", {"layer_types": ["full_attention"] * 2}),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 3}),
    ("gemma3_text_old_config", {"rope_local_base_freq": 1000000.0}),
    ("gemma3_text_old_config", {"layer_types": ["sliding_attention"] * 6}),
    ("phi3", {"sliding_window": None}),
    ("phi3_longrope", {"max_position_embeddings": 512}),
    ("phi3_longrope_old_config", {"rope_scaling": None}),
    ("phi3_longrope_old_config", {"partial_rotary_factor": 1.0, "rope_scaling": None}),
    ("olmo", {"clip_qkv": None}),
    ("stablelm", {"layer_norm_eps": 1e-2}),
    ("stablelm_parallel", {"qk_layernorm": False}),
    ("internlm", {"rotary": {"base": 10000.0}}),
    ("minicpm", {"scale_emb": 1}),
    ("minicpm", {"scale_depth": 1.0}),
    ("minicpm", {"dim_model_base": 32}),
    ("minicpm_moe", {"num_experts_per_tok": 3}),
    ("baichuan_alibi", {"max_position_embeddings": 256}),
    ("cohere", {"logit_scale": 0.25}),
    ("starcoder2", {"sliding_window": 10}),
    *(
        ("llama4_text", edit)
        for edit in (
            {"attention_chunk_size": 10},
            {"use_qk_norm": False},
            {"attn_temperature_tuning": False},
            {"no_rope_layers": [1, 1, 1, 1]},
            {"num_experts_per_tok": 2},
        )
    ),
    ("deepseek", {"norm_topk_prob": True}),
    ("deepseek", {"num_experts_per_tok": 2}),
    ("qwen", {"rotary_emb_base": 10000.0}),
    ("qwen", {"layer_norm_epsilon": 1e-2}),
    *(
        ("ministral3_text", {"rope_parameters": {**_MINISTRAL_ROPE, **edit}})
        for edit in (
            {"llama_4_scaling_beta": 0},
            {"original_max_position_embeddings": 32},
            {"factor": 2.0},
            {"mscale": 0.5},
        )
    ),
    ("chatglm", {"rope_ratio": 1.0}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    ("smollm3", {"layer_types": ["full_attention"] * 4}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 8**-0.5}),
    ("granitemoe", {"num_experts_per_tok": 3}),
    ("granitemoehybrid", {"position_embedding_type": None}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("cohere2", {"sliding_window": 20}),
    ("exaone4", {"layer_types": ["sliding_attention"] * 3}),
    ("glm4", {"rope_parameters": {"rope_theta": 20000.0}}),
    ("olmo3", {"layer_types": ["sliding_attention"] * 4}),
    ("hunyuan_v1_dense", {"rope_scaling": {"alpha": 1.0}}),
    ("qwen3_5_moe", {"num_experts_per_tok": 3}),
    ("qwen3_next", {"norm_topk_prob": False}),
    ("qwen3_next", {"partial_rotary_factor": 0.25}),
    ("glm4_moe", {"routed_scaling_factor": 1.0}),
    ("dots1", {"sliding_window": 30}),
    ("glm4_moe", {"norm_topk_prob": False}),
    ("olmo3", {"layer_types": ["full_attention"] * 4}),
    ("gpt_oss", {"sliding_window": 10}),
    ("gpt_oss", {"layer_types": ["sliding_attention", *["full_attention"] * 2]}),
    ("gpt_oss", {"num_experts_per_tok": 3}),
    ("gpt_oss", {"swiglu_alpha": 1.702}),
    ("gpt_oss", {"swiglu_limit": 7.0}),
]


def relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_follow_from_checkpoint(case: ReferenceCase) -> None:
    reference = case.load()
    logits = forward(case.config(), read_weights(case.directory), reference.token_ids.tolist())
    assert logits.shape == reference.logits.shape == (len(reference.token_ids), 131)
    assert relative_error(logits, reference.logits) < 3e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_follow_from_checkpoint(case: ReferenceCase) -> None:
    reference = case.load()
    prompt, expected = reference.token_ids.tolist(), reference.greedy_tokens.tolist()
    logits = forward(case.config(), read_weights(case.directory), prompt + expected[:-1])
    assert logits[len(prompt) - 1 :].argmax(axis=-1).tolist() == expected
    assert len(expected) == 20 and len(set(expected)) >= 10


@pytest.mark.parametrize(("name", "edit"), FEATURES)
def test_feature_shows_in_logits(name: str, edit: dict[str, Any]) -> None:
    case = get_case(name)
    reference = case.load()
    config = {**case.config(), **edit}
    logits = forward(config, read_weights(case.directory), reference.token_ids.tolist())
    assert relative_error(logits, reference.logits) > 1e-3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama_attention_bias", 8),
        ("qwen2_gqa", 6),
        ("stablelm", 11),
        ("internlm", 8),
        ("orion", 5),
        ("nemotron", 5),
        ("starcoder2", 17),
        ("chatglm", 2),
        ("gpt_oss", 24),
        ("qwen", 2),
        ("granite", 8),
        ("glm", 6),
        ("seed_oss", 12),
        ("ernie4_5", 14),
        ("glm4_moe", 7),
    ],
)
def test_every_bias_shows_in_logits(name: str, count: int) -> None:
    case = get_case(name)
    reference = case.load()
    weights = read_weights(case.directory)
    biases = [name for name in weights if name.endswith(("bias", ".sinks"))]
    assert len(biases) == count
    for bias in biases:
        changed = {**weights, bias: np.zeros_like(weights[bias])}
        logits = forward(case.config(), changed, reference.token_ids.tolist())
        assert relative_error(logits, reference.logits) > 1e-3, bias


def test_files_are_what_the_cases_name() -> None:
    directories = sorted(path.parent.name for path in REFERENCES.glob("*/config.json"))
    assert directories == sorted(case.name for case in CASES)
    manifest = json.loads((REFERENCES / "manifest.json").read_text())
    assert list(manifest) == [case.name for case in CASES]
    for case in CASES:
        dtypes = {str(tensor.dtype) for tensor in read_weights(case.directory).values()}
        assert dtypes == {case.dtype}
    shards = sorted(path.name for path in get_case("llama_mha_sharded").directory.glob("model*"))
    assert len(shards) == 3 and shards[-1] == "model.safetensors.index.json"
    assert "lm_head.weight" not in read_weights(get_case("llama_tied").directory)


def test_both_config_styles_are_there() -> None:
    old = [case.name for case in CASES if "torch_dtype" in case.config()]
    new = [case.name for case in CASES if "dtype" in case.config()]
    assert sorted(old + new) == sorted(case.name for case in CASES)
    named = [case.name for case in CASES if case.name.endswith("_old_config")]
    assert len(named) > 10 and set(named) <= set(old)
    for name in named:
        config = get_case(name).config()
        assert "rope_theta" in config and "rope_parameters" not in config
