"""gpt-oss as it is published: its configuration, and experts in MXFP4."""

import json
import math

import numpy as np
import pytest
from make_packed import make_mxfp4
from safetensors.numpy import save_file

from mlc_llm.artifact import read_tensor_index
from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.weights.convert import convert
from mlc_llm.weights.open import open_source

EXPERTS, WIDTH, HIDDEN, VOCAB = 3, 32, 64, 40
# What the smaller of the published models says of itself.
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
SMALL = {
    **CONFIG,
    "head_dim": 16,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "layer_types": ["sliding_attention"],
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "vocab_size": VOCAB,
}


def read(**changes):
    return find_family(CONFIG).config_from_huggingface({**CONFIG, **changes})


def make_plan(config, quantization="q0f32"):
    family = find_family(config)
    scheme = get_scheme(quantization)
    return plan_parameters(family, family.config_from_huggingface(config), scheme)


def test_published_configuration():
    config = read()
    assert [config.window_of(layer) for layer in (0, 1, 22, 23)] == [128, -1, 128, -1]
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)
    assert config.ropes[0].table_scale == pytest.approx(0.1 * math.log(32) + 1)
    assert sum(math.prod(item.shape) for item in make_plan(CONFIG)) == 20_914_757_184
    without = read(layer_types=None, num_experts_per_tok=None, attention_bias=None)
    assert without == read(layer_types=None) and without.window_of(2) == 128


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts_per_tok": 33}, CorruptFile, "a token has 33 experts, the model 32"),
        ({"layer_types": ["full_attention"]}, CorruptFile, "layer_types must name"),
        ({"layer_types": ["chunked_attention"] * 24}, CorruptFile, "layer_types must name"),
        ({"layer_types": 24}, CorruptFile, "layer_types"),
        ({"swiglu_limit": -7.0}, CorruptFile, "swiglu_limit is -7.0"),
        ({"swiglu_alpha": "high"}, CorruptFile, "swiglu_alpha must be of type float, is 'high'"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act 'gelu'"),
    ],
)
def test_bad_configurations_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        read(**changes)


def write_pair(rng, directory):
    """Write a checkpoint in MXFP4 and the plain one it stands for; return their tensors."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    block = "model.layers.0."
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{block}{name}.weight"] = (HIDDEN,)
    for part, rows in (("q", 64), ("k", 32), ("v", 32), ("o", HIDDEN)):
        shapes[f"{block}self_attn.{part}_proj.weight"] = (rows, 64)
        shapes[f"{block}self_attn.{part}_proj.bias"] = (rows,)
    shapes[block + "self_attn.sinks"] = (4,)
    shapes[block + "mlp.router.weight"] = (EXPERTS, HIDDEN)
    shapes[block + "mlp.router.bias"] = (EXPERTS,)
    shapes[block + "mlp.experts.gate_up_proj_bias"] = (EXPERTS, 2 * WIDTH)
    shapes[block + "mlp.experts.down_proj_bias"] = (EXPERTS, HIDDEN)
    common = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    packed, plain = dict(common), dict(common)
    for name, rows, columns in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        parts, weight = make_mxfp4(rng, EXPERTS, rows, columns // 32)
        plain[f"{block}mlp.experts.{name}"] = weight
        packed |= {f"{block}mlp.experts.{name}_{part}": array for part, array in parts.items()}
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    write(directory / "packed", packed, {**SMALL, "quantization_config": settings})
    write(directory / "plain", plain, SMALL)
    return packed, plain


def write(directory, tensors, config):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def converted(directory, output, quantization):
    source = open_source(directory)
    convert(make_plan(source.config, quantization), source, output, lambda *_: None)
    return read_tensor_index(output)


@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_mxfp4_is_the_plain_checkpoint(tmp_path, quantization):
    _, plain = write_pair(np.random.default_rng(5), tmp_path)
    found = converted(tmp_path / "packed", tmp_path / "a", quantization)
    expected = converted(tmp_path / "plain", tmp_path / "b", quantization)
    assert list(found.records) == list(expected.records)
    for name in expected.records:
        np.testing.assert_array_equal(found.read(name), expected.read(name))
    if quantization == "q0f32":
        both = plain["model.layers.0.mlp.experts.gate_up_proj"]
        weight = found.read("model.layers.0.mlp.moe_gate_up_proj.weight")
        np.testing.assert_array_equal(weight[1, WIDTH + 2], both[1, :, 5])
        np.testing.assert_array_equal(weight[2, 2], both[2, :, 4])


def test_experts_of_another_size_are_refused(tmp_path):
    packed, _ = write_pair(np.random.default_rng(5), tmp_path)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    write(
        tmp_path / "other",
        {**packed, name: packed[name][:1]},
        {
            **SMALL,
            "quantization_config": {"quant_method": "mxfp4"},
        },
    )
    with pytest.raises(ParameterMismatch, match=r"down_proj.*do not fit each other"):
        open_source(tmp_path / "other")
