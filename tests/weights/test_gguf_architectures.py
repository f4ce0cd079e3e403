"""GGUF architectures: names against the gguf package's own map, values, configurations."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from make_gguf import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, interleave_halves, write_gguf

from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.models.registry import find_family
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.gguf_architectures import ARCHITECTURES, MIXTRAL, PHI_MSFT
from mlc_llm.weights.gguf_deepseek import DEEPSEEK3

EXPERTS, RANK = 3, 20
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

# Shapes as Hugging Face has them, under GGUF's names.
_SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "position_embd": (128, HIDDEN),
    "output_norm": (HIDDEN,),
    "output": (VOCAB, HIDDEN),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "post_attention_norm": (HIDDEN,),
    "post_ffw_norm": (HIDDEN,),
    "attn_q": (Q, HIDDEN),
    "attn_k": (KV, HIDDEN),
    "attn_v": (KV, HIDDEN),
    "attn_qkv": (3 * Q, HIDDEN),
    "attn_output": (HIDDEN, Q),
    "attn_q_norm": (HEAD_DIM,),
    "attn_k_norm": (HEAD_DIM,),
    "attn_sinks": (HEADS,),
    "attn_q_a": (RANK, HIDDEN),
    "attn_q_a_norm": (RANK,),
    "attn_q_b": (HEADS * 24, RANK),
    "attn_kv_a_mqa": (RANK + 8, HIDDEN),
    "attn_kv_a_norm": (RANK,),
    "attn_kv_b": (HEADS * 32, RANK),
    "attn_k_b": (HEADS, RANK, 16),
    "attn_v_b": (HEADS, 16, RANK),
    "exp_probs_b": (EXPERTS,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
    "ffn_gate_inp": (EXPERTS, HIDDEN),
    "ffn_gate_exps": (EXPERTS, 32, HIDDEN),
    "ffn_up_exps": (EXPERTS, 32, HIDDEN),
    "ffn_down_exps": (EXPERTS, HIDDEN, 32),
    "ffn_gate_inp_shexp": (1, HIDDEN),
    "ffn_gate_shexp": (FFN, HIDDEN),
    "ffn_up_shexp": (FFN, HIDDEN),
    "ffn_down_shexp": (HIDDEN, FFN),
}
_METADATA = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": FFN,
    "attention.layer_norm_epsilon": 1e-5,
    "logit_scale": 0.25,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
}
_WITHOUT_EXPERTS = {key: value for key, value in _METADATA.items() if "expert" not in key}
CASES = {**ARCHITECTURES, "mixtral": MIXTRAL, "phi-msft": PHI_MSFT, "deepseek_v3": DEEPSEEK3}
# Told apart by their content.
_STORED_AS = {"mixtral": "llama", "phi-msft": "phi2", "deepseek_v3": "deepseek2"}
# Heads of 24 values, 8 of them rotated, and of 16.
_LATENT = {
    "attention.kv_lora_rank": RANK,
    "attention.q_lora_rank": RANK,
    "attention.head_count_kv": 1,
    "attention.key_length": RANK + 8,
    "attention.value_length": RANK,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
}


def tensor_names(architecture):
    """Return GGUF name -> Hugging Face name of one layer, endings included."""
    return {
        f"{name}.weight".format(layer=0): f"{other}.weight".replace("{layer}", "0")
        for name, other in architecture.tensors.items()
    }


def as_stored(tensor, change):
    """Change a tensor as llama.cpp's converter does, one element after another."""
    match change:
        case "q_halves":
            return interleave_halves(tensor, HEADS)
        case "k_halves":
            return interleave_halves(tensor, KV_HEADS)
        case "plus_one":
            return tensor + np.float32(1)
        case "transposed":
            return np.ascontiguousarray(tensor.T)
        case "flat":
            return tensor[0]
        case "qkv_groups":
            parts = [[], [], []]
            for row in range(len(tensor)):
                parts[row // HEAD_DIM % 3].append(tensor[row])
            return np.concatenate([np.array(part) for part in parts])
    return tensor


def write_model(path, name, metadata=None, quantization=gguf.GGMLQuantizationType.F32):
    """Write a model of one layer; return its file and its tensors as Hugging Face has them."""
    architecture = CASES[name]
    rng = np.random.default_rng(17)
    stored, expected = {}, {}
    for gguf_name, huggingface_name in tensor_names(architecture).items():
        pattern = gguf_name.removesuffix(".weight").replace("blk.0", "blk.{layer}")
        change = architecture.changes.get(pattern)
        shape = _SHAPES[pattern.removeprefix("blk.{layer}.")]
        if change == "transposed":
            shape = shape[::-1]
        tensor = rng.standard_normal(shape).astype(np.float32)
        stored[gguf_name] = as_stored(tensor, change)
        if "{expert}" in huggingface_name:
            for expert in range(EXPERTS):
                expected[huggingface_name.replace("{expert}", str(expert))] = tensor[expert]
        else:
            expected[huggingface_name] = tensor
    has_experts = any("{expert}" in other for other in architecture.tensors.values())
    values = {**(_METADATA if has_experts else _WITHOUT_EXPERTS), **(metadata or {})}
    if architecture.with_window:
        values.setdefault("attention.sliding_window", 64)
    if architecture.is_latent:
        scoring = {"expert_gating_func": 2} if name == "deepseek_v3" else {}
        values = {**values, **_LATENT, **scoring, **(metadata or {})}
    arch = _STORED_AS.get(name, name)
    write_gguf(path, stored, arch=arch, metadata=values, quantization=quantization)
    return path, expected


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_as_hugging_face_has_it(tmp_path, name):
    path, expected = write_model(tmp_path / "m.gguf", name)
    source = GGUFSource(path)
    assert sorted(source.names()) == sorted(expected)
    for tensor_name, tensor in expected.items():
        assert source.shape(tensor_name) == tensor.shape
        found = source.read(tensor_name)
        np.testing.assert_allclose(found, tensor, rtol=1e-6, atol=1e-6)
    assert source.config["architectures"] == [CASES[name].class_name]
    assert source.config["model_type"] == CASES[name].model_type


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_of_the_packages_map(name):
    names = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    kind = names[_STORED_AS.get(name, name)]
    mapping = gguf.get_tensor_name_map(kind, 2)
    for gguf_name, huggingface_name in tensor_names(CASES[name]).items():
        if "{expert}" in huggingface_name:
            # The converter stacks them under a name without the number.
            huggingface_name = huggingface_name.replace("experts.{expert}", "experts")
        if name == "chatglm":
            huggingface_name = huggingface_name.removeprefix("transformer.")
        found = mapping.get_name(huggingface_name, try_suffixes=(".weight",))
        assert found == gguf_name, huggingface_name


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_quantized_experts_are_read_alone(tmp_path, name, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q8_0
    path, expected = write_model(tmp_path / "m.gguf", name, quantization=kind)
    source = GGUFSource(path)
    experts = [name for name in expected if ".experts." in name]
    assert len(experts) == 3 * EXPERTS
    sizes = []
    whole = gguf.dequantize

    def counted(data, qtype):
        sizes.append(data.nbytes)
        return whole(data, qtype)

    monkeypatch.setattr("gguf.dequantize", counted)
    for tensor_name in experts:
        tensor = expected[tensor_name]
        found = source.read(tensor_name)
        np.testing.assert_array_equal(found, whole(gguf.quantize(tensor, kind), kind))
        codes = source.read_encoded(tensor_name)
        assert codes is not None and codes.codes.shape == tensor.shape
    assert max(sizes) == 32 * HIDDEN // 32 * 34


def test_experts_in_mxfp4(tmp_path):
    kind = gguf.GGMLQuantizationType.MXFP4
    path, expected = write_model(tmp_path / "m.gguf", "gpt-oss", quantization=kind)
    source = GGUFSource(path)
    for name in (name for name in expected if ".experts." in name):
        stored = gguf.dequantize(gguf.quantize(expected[name], kind), kind)
        np.testing.assert_array_equal(source.read(name), stored)
        assert source.read_encoded(name) is None
        error = np.linalg.norm(stored - expected[name])
        assert error < 0.2 * np.linalg.norm(expected[name])


def test_codes_follow_the_order_of_rows(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("llama", "gptneox", "gpt2"):
        path, expected = write_model(tmp_path / f"{name}.gguf", name, quantization=kind)
        source = GGUFSource(path)
        for tensor_name, tensor in expected.items():
            codes = source.read_encoded(tensor_name)
            if tensor.ndim == 1 or (name == "gpt2" and ".h." in tensor_name):
                assert codes is None
                continue
            assert codes is not None
            scale = np.repeat(codes.scale, codes.codes.shape[1] // codes.scale.shape[1], axis=1)
            values = (codes.codes.astype(np.float32) - codes.zero) * scale
            np.testing.assert_allclose(values, source.read(tensor_name), rtol=1e-6)


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


def test_the_page_lists_every_architecture():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert not [name for name in ARCHITECTURES if f"`{name}`" not in page]


def test_experts_where_there_should_be_none(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"has experts \(qwen2\.expert_count is 8\)"):
        config_of(tmp_path, "qwen2", expert_count=8)
    with pytest.raises(CorruptFile, match="claims 1,000,000 experts"):
        config_of(tmp_path, "qwen3moe", expert_count=1000000)


def test_unknown_names_stay(tmp_path):
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    strange = ("blk.0.attn_sinks.weight", "blk.x.attn_q.weight", "blk.0.attn_q", "blk..weight")
    tensors |= {name: np.zeros(32, np.float32) for name in strange}
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors))
    assert sorted(source.names()) == sorted(["model.embed_tokens.weight", *strange])
    with pytest.raises(ParameterMismatch, match=r"no tensor for token_embd"):
        source.read("token_embd.weight")


@pytest.mark.parametrize("name", ["llama", "gptneox"])
def test_rows_that_heads_cannot_share(tmp_path, name):
    part = "attn_q" if name == "llama" else "attn_qkv"
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    tensors[f"blk.0.{part}.weight"] = np.zeros((7, HIDDEN), np.float32)
    metadata = {"attention.layer_norm_epsilon": 1e-5}
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors, arch=name, metadata=metadata))
    with pytest.raises(ParameterMismatch, match="has 7 rows, which 4 heads cannot share"):
        source.read(source.names()[-1])
