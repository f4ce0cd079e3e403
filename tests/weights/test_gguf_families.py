"""Every reference checkpoint written as GGUF, as llama.cpp's converter does, is the same model."""

import gguf
import numpy as np
import pytest
from gguf_cases import converted, write_case
from reference_cases import read_cases

from mlc_llm.weights.gguf_architectures import ARCHITECTURES, MIXTRAL
from mlc_llm.weights.open import open_source

_MODEL_TYPES = {architecture.model_type for architecture in ARCHITECTURES.values()}
_MODEL_TYPES |= {"mistral", "mixtral", "deepseek_v3", "glm", "olmo3", "granitemoeshared"}
# GGUF cannot say which layers have no experts, nor, as the converter writes it, that the keys of
# GPT-BigCode have all heads. Sizes tell which Baichuan is of version 2 or has ALiBi: not these.
# Of llama3 scaling it has the divisors, and these models too few of them to tell what made them.
_NOT_IN_GGUF = (
    *("qwen2_moe", "llama_rope_llama3", "llama_rope_llama3_tied_old_config"),
    *("gpt_bigcode_all_heads", "baichuan2", "baichuan_alibi"),
    # Of YaRN's two scales it has one.
    *("deepseek_v2_greedy_yarn", "deepseek_v3_yarn"),
    # Not read from GGUF: experts of MiniCPM, norms of single heads of StableLM.
    *("minicpm_moe", "stablelm_parallel"),
    # Written by test_gguf_rwkv.py and test_gguf_hybrid.py.
    *("rwkv6", "qwen3_next"),
)
# Fields of some cases that GGUF has no place for; of real models they follow from the others.
_UNSAID = {
    "gemma2": ("layer_types", "query_pre_attn_scalar"),
    "gemma2_old_config": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("layer_types", "query_pre_attn_scalar"),
    "qwen3_bias_window_old_config": ("sliding_window_size", "max_window_layers", "layer_types"),
    "starcoder2": ("sliding_window_size",),
    "qwen": ("use_logn_attn", "use_dynamic_ntk", "seq_length"),
    # Of all published models the same.
    "llama4_text": (
        *("layer_types", "no_rope_layers", "moe_layers"),
        *("attention_chunk_size", "floor_scale", "attn_scale"),
    ),
    "smollm3": ("no_rope_layers", "layer_types", "sliding_window_size", "sliding_window"),
    # Said of each layer; what it means is compared.
    "cohere2": ("layer_types", "sliding_window_pattern"),
    # Stored as float32; frequencies are compared.
    "hunyuan_v1_dense": ("position_embedding_base",),
    "gpt_oss": ("layer_types", "swiglu_alpha", "swiglu_limit"),
}

CASES = [
    case
    for case in read_cases()
    if case.model_type in _MODEL_TYPES and case.name not in _NOT_IN_GGUF
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_reference_as_gguf_is_the_same_model(tmp_path, case):
    source = open_source(case.directory)
    path = write_case(tmp_path / "model.gguf", source)
    family, config, weights = converted(source, tmp_path / "original")
    from_gguf = converted(open_source(path), tmp_path / "gguf")
    assert from_gguf[0].build is family.build
    found, expected = from_gguf[1].to_json(), config.to_json()
    if found.get("max_window_layers") == 0:  # means nothing without a window
        expected["max_window_layers"] = 0
    # A scaling may be written in several ways; what it does is compared.
    for ours, theirs in zip(from_gguf[1].ropes, config.ropes, strict=True):
        np.testing.assert_allclose(ours.inverse_frequencies(), theirs.inverse_frequencies())
        assert ours.table_scale == pytest.approx(theirs.table_scale)
    if case.name in ("cohere2", "exaone4", "olmo3"):
        for layer in range(config.num_hidden_layers):
            assert from_gguf[1].window_of(layer) == config.window_of(layer)
            assert from_gguf[1].rope_of(layer) == config.rope_of(layer)
    forms = ("has_split_qkv", "has_split_experts", "has_split_kv_b", "is_from_gguf")
    for name in ("rope_scaling", *forms, *_UNSAID.get(case.name, ())):
        found.pop(name, None)
        expected.pop(name, None)
    assert found == expected
    np.testing.assert_allclose(
        np.frombuffer(from_gguf[2], np.float32),
        np.frombuffer(weights, np.float32),
        rtol=1e-6,
        atol=1e-6,
    )


def test_keys_are_those_of_the_package():
    keys = {
        value.removeprefix("{arch}.")
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    for architecture in (*ARCHITECTURES.values(), MIXTRAL):
        for key, _, _ in architecture.numbers.values():
            assert key in keys, key


def test_many_families_were_tried():
    tried = {case.model_type for case in CASES}
    assert {"llama", "mistral", "qwen2", "gpt2", "gpt_neox"} <= tried
