"""Configurations that are read from the metadata of GGUF files."""

import gguf
import numpy as np
import pytest
from gguf_models import EXPERTS, RANK, write_model
from make_gguf import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, write_gguf

from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.models.registry import find_family
from mlc_llm.weights.gguf import GGUFSource


def config_of(tmp_path, name, **metadata):
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return GGUFSource(write_model(tmp_path / "m.gguf", name, keys)[0]).config


def test_mixtral_and_other_experts(tmp_path):
    config = config_of(tmp_path, "mixtral")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)
    config = config_of(tmp_path, "qwen3moe")
    assert (config["num_experts"], config["moe_intermediate_size"]) == (3, 32)
    assert config["norm_topk_prob"] is True and config["head_dim"] == HEAD_DIM
    config = config_of(tmp_path, "qwen2moe")
    assert config["shared_expert_intermediate_size"] == FFN
    assert config["norm_topk_prob"] is False


def test_qwen(tmp_path):
    config = config_of(tmp_path, "qwen", rope__freq_base=5000.0)
    assert (config["rotary_emb_base"], config["intermediate_size"]) == (5000.0, FFN)
    assert "layer_norm_epsilon" in config and config["use_dynamic_ntk"] is False


def test_deepseek(tmp_path):
    metadata = {"expert_shared_count": 2, "leading_dense_block_count": 1}
    config = config_of(tmp_path, "deepseek", **metadata)
    names = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size")
    assert [config[name] for name in names] == [EXPERTS, 2, 2, 32]
    assert config["first_k_dense_replace"] == 1 and config["routed_scaling_factor"] == 1


def test_deepseek_with_latent_attention(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    scaling = {f"rope__scaling__{key}": value for key, value in yarn.items()}
    log_mul = {"rope__scaling__yarn_log_multiplier": 0.0707}
    config = config_of(tmp_path, "deepseek2", **scaling, **log_mul, expert_group_count=1)
    sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [config[name] for name in sizes] == [RANK, RANK, 16, 8, 16]
    assert (config["num_key_value_heads"], config["topk_method"]) == (HEADS, "greedy")
    assert config["rope_scaling"]["mscale"] == config["rope_scaling"]["mscale_all_dim"] == 0.707
    found = find_family(config).config_from_huggingface(config)
    assert found.attention_scale == pytest.approx(24**-0.5 * (1 + 0.0707 * np.log(4)) ** 2)
    assert found.ropes[0].table_scale == 1 and found.has_split_kv_b

    groups = {"expert_group_count": 3, "expert_group_used_count": 2}
    config = config_of(tmp_path, "deepseek2", **groups, attention__q_lora_rank=0)
    assert (config["topk_method"], config["q_lora_rank"]) == ("group_limited_greedy", None)
    assert config["rope_scaling"] is None
    config = config_of(tmp_path, "deepseek_v3", **groups, expert_weights_norm=True)
    found = find_family(config).config_from_huggingface(config)
    assert (found.routing.scoring, found.routing.num_groups, found.routing.top_groups) == (
        "sigmoid",
        3,
        2,
    )
    assert found.norm_topk_prob and found.topk_method == "noaux_tc"
    with pytest.raises(CorruptFile, match="heads of 8 values, 8 of them rotated"):
        config_of(tmp_path, "deepseek2", attention__key_length_mla=8)


def test_gpt_oss(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 8.0}
    scaling = {f"rope__scaling__{key}": value for key, value in yarn.items()}
    config = config_of(tmp_path, "gpt-oss", **scaling)
    assert config["rope_scaling"]["truncate"] is False and config["sliding_window"] == 64
    assert config["rope_scaling"]["beta_fast"] == 8 and config["rope_scaling"]["beta_slow"] == 1
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (EXPERTS, 2)


def test_gemma(tmp_path):
    config = config_of(tmp_path, "gemma2", attn_logit_softcapping=40.0)
    assert config["attn_logit_softcapping"] == 40.0
    assert config["final_logit_softcapping"] == 30.0
    assert config["sliding_window"] == 64
    assert config["query_pre_attn_scalar"] == HEAD_DIM == config["head_dim"]
    assert config["hidden_activation"] == config["hidden_act"] == "gelu_pytorch_tanh"
    assert config_of(tmp_path, "gemma")["tie_word_embeddings"] is True
    config = config_of(tmp_path, "gemma3", rope__freq_base=1e6)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["sliding_window_pattern"] == 6
    metadata = {"block_count": 46, "attention.key_length": 8, "attention.value_length": 8}
    config = GGUFSource(write_model(tmp_path / "b.gguf", "gemma2", metadata)[0]).config
    assert config["query_pre_attn_scalar"] == HIDDEN // HEADS == 16


def test_partial_rotary(tmp_path):
    for name in ("phi3", "stablelm"):
        config = config_of(tmp_path, name, rope__dimension_count=HEAD_DIM // 2)
        assert config["partial_rotary_factor"] == 0.5
    config = config_of(tmp_path, "gptneox", rope__dimension_count=HEAD_DIM // 4)
    assert config["rotary_pct"] == 0.25 and config["rotary_emb_base"] == 10000.0
    with pytest.raises(UnsupportedModel, match="partial rotary embedding"):
        config_of(tmp_path, "qwen3", rope__dimension_count=HEAD_DIM // 2)


def test_layer_norms(tmp_path):
    for name, key in (
        ("stablelm", "layer_norm_eps"),
        ("starcoder2", "norm_epsilon"),
        ("gpt2", "layer_norm_epsilon"),
        ("gptneox", "layer_norm_eps"),
    ):
        config = config_of(tmp_path, name)
        assert config[key] == 1e-5
        assert "rms_norm_eps" not in config
    assert config_of(tmp_path, "stablelm", use_parallel_residual=True)["use_parallel_residual"]


def test_gpt2_has_its_own_names(tmp_path):
    config = config_of(tmp_path, "gpt2")
    wanted = {"n_embd": HIDDEN, "n_inner": FFN, "n_head": HEADS, "n_layer": 1, "n_positions": 128}
    assert {key: config[key] for key in wanted} == wanted
    assert "rope_theta" not in config and "hidden_size" not in config


def test_longrope_and_yarn(tmp_path):
    path, _ = write_model(tmp_path / "m.gguf", "phi3")
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    long, short = np.linspace(1, 9, HEAD_DIM // 2), np.linspace(1, 2, HEAD_DIM // 2)
    tensors["rope_factors_long.weight"] = long.astype(np.float32)
    tensors["rope_factors_short.weight"] = short.astype(np.float32)
    metadata = {"rope.scaling.original_context_length": 32, "attention.sliding_window": 64}
    path = write_gguf(tmp_path / "l.gguf", tensors, arch="phi3", metadata=metadata)
    source = GGUFSource(path)
    scaling = source.config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    np.testing.assert_allclose(scaling["long_factor"], long, rtol=1e-6)
    np.testing.assert_allclose(scaling["short_factor"], short, rtol=1e-6)
    assert source.config["original_max_position_embeddings"] == 32
    assert source.config["sliding_window"] == 64
    assert not any("rope" in name for name in source.names())
    tensors["rope_factors_long.weight"] = np.full(3, np.nan, np.float32)
    with pytest.raises(CorruptFile, match="is no table of 8 factors"):
        GGUFSource(write_gguf(tmp_path / "d.gguf", tensors, arch="phi3", metadata=metadata))
    config = config_of(
        tmp_path,
        "qwen3",
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=64,
    )
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_scaling"]["original_max_position_embeddings"] == 64
    assert config["rope_scaling"]["beta_fast"] == 32 and "truncate" not in config["rope_scaling"]


def test_baichuan_by_its_sizes(tmp_path):
    assert config_of(tmp_path, "baichuan")["max_position_embeddings"] == 128
    larger = config_of(tmp_path, "baichuan", block_count=40)
    assert "max_position_embeddings" not in larger and larger["model_max_length"] == 128
    family = find_family(larger)
    assert family.config_from_huggingface(larger).alibi
    second = {**larger, "vocab_size": 125696}
    assert family.config_from_huggingface(second).normalized_head


def test_chatglm(tmp_path):
    half = {"rope__freq_base": 5000000.0, "rope__dimension_count": HEAD_DIM // 2}
    config = config_of(tmp_path, "chatglm", **half)
    assert (config["rope_ratio"], config["partial_rotary_factor"]) == (500, 0.5)
    assert (config["ffn_hidden_size"], config["multi_query_group_num"]) == (FFN, KV_HEADS)
    assert config["add_qkv_bias"] is False and config["add_bias_linear"] is False
    assert find_family(config).config_from_huggingface(config).position_embedding_base == 5000000


def test_queries_of_ministral_grow_after_the_trained_length(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    scaling = {f"rope__scaling__{key}": value for key, value in yarn.items()}
    more = {"attention__temperature_scale": 0.1, "rope__scaling__yarn_log_multiplier": 0.5}
    config = config_of(tmp_path, "mistral3", **scaling, **more)
    found = find_family(config).config_from_huggingface(config)
    assert (found.query_scale.strength, found.query_scale.period) == (0.1, 64)
    # YaRN's factor for mscale, over that for mscale_all_dim.
    growth = np.log(4) / 10
    assert found.ropes[0].table_scale == pytest.approx((1 + growth) / (1 + 0.5 * growth))
    config = config_of(tmp_path, "mistral3", **scaling)
    found = find_family(config).config_from_huggingface(config)
    assert found.query_scale is None and found.ropes[0].table_scale == pytest.approx(1 + growth)
    assert config_of(tmp_path, "mistral3")["rope_scaling"] is None


def test_minicpm_of_early_converters(tmp_path):
    """Their files lack the factors; llama.cpp takes those of the model for 2B."""
    new = {"embedding_scale": 12.0, "residual_scale": 1.4 / 40**0.5, "logit_scale": 64 / 256}
    for factors in ({"logit_scale": 0.0}, new):  # as where it is not there
        path, _ = write_model(tmp_path / "m.gguf", "minicpm", {"block_count": 40, **factors})
        config = GGUFSource(path).config
        assert (config["scale_emb"], config["scale_depth"]) == (12, 1.4)
        assert config["dim_model_base"] == 256


def test_olmo_that_clips_nothing(tmp_path):
    assert config_of(tmp_path, "olmo")["clip_qkv"] is None
    assert config_of(tmp_path, "olmo", attention__clamp_kqv=8.0)["clip_qkv"] == 8


def test_first_form_of_phi_is_told_by_its_tensors(tmp_path):
    path, _ = write_model(tmp_path / "m.gguf", "phi-msft", {"rope.dimension_count": 8})
    config = GGUFSource(path).config
    family = find_family(config)
    assert (family.name, config["n_embd"], config["n_inner"]) == ("phi-msft", HIDDEN, FFN)
    assert family.config_from_huggingface(config).rotary_dim == 8


def test_experts_where_there_should_be_none(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"has experts \(qwen2\.expert_count is 8\)"):
        config_of(tmp_path, "qwen2", expert_count=8)
    with pytest.raises(CorruptFile, match="claims 1,000,000 experts"):
        config_of(tmp_path, "qwen3moe", expert_count=1000000)


def test_windows_said_of_each_layer(tmp_path):
    sizes = {"block_count": 4, "attention__sliding_window": 64}
    pattern = {"attention__sliding_window_pattern": [True, False, False, True]}
    content = config_of(tmp_path, "exaone4", **sizes, **pattern)
    config = find_family(content).config_from_huggingface(content)
    assert [config.window_of(layer) for layer in range(4)] == [64, -1, -1, 64]
    content = config_of(tmp_path, "exaone4", attention__sliding_window=0)
    config = find_family(content).config_from_huggingface(content)
    assert (config.window_of(0), config.rope_of(0)) == (-1, 0)
    content = config_of(tmp_path, "cohere2", block_count=4)
    config = find_family(content).config_from_huggingface(content)
    assert [config.window_of(layer) for layer in range(4)] == [64, 64, 64, -1]
    every = {"attention__sliding_window_pattern": 2}
    assert config_of(tmp_path, "cohere2", **every)["sliding_window_pattern"] == 2
    with pytest.raises(UnsupportedModel, match="must say for each of 4 layers"):
        config_of(tmp_path, "exaone4", **sizes, attention__sliding_window_pattern=[True])


def test_olmo_of_third_generation_is_told_by_its_window(tmp_path):
    assert config_of(tmp_path, "olmo2")["model_type"] == "olmo2"
    content = config_of(tmp_path, "olmo2", attention__sliding_window=64)
    config = find_family(content).config_from_huggingface(content)
    assert content["model_type"] == "olmo3"
    assert (config.window_of(0), config.window_of(3)) == (64, -1)
    assert config.ropes[0].base == config.ropes[1].base == 10000
