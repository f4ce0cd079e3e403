"""Quantized checkpoints read as plain ones: every method against a slow packer of the tests."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from make_packed import make_awq, make_float8, make_gptq, make_mxfp4, make_packed_rows
from reference_cases import REFERENCES
from safetensors.numpy import save_file

from mlc_llm.errors import CorruptFile, MlcError, ParameterMismatch, UnsupportedModel
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.encoded import AwqArrays, Float8Blocks
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.weights.convert import convert
from mlc_llm.weights.dequantized import DequantizedSource
from mlc_llm.weights.huggingface import HuggingFaceSource
from mlc_llm.weights.open import open_source
from mlc_llm.weights.source import EncodedSource


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def write(tmp_path):
    """Write a directory of tensors with a quantization_config, and open it."""

    def write_and_open(tensors, settings, source_format="auto"):
        config = {"model_type": "llama", "quantization_config": settings}
        (tmp_path / "config.json").write_text(json.dumps(config))
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(whole, tmp_path / "model.safetensors")
        return open_source(tmp_path, source_format)

    return write_and_open


def under(module, parts):
    return {f"{module}.{part}": array for part, array in parts.items()}


def check(source, name, expected):
    assert source.names().count(name) == 1
    assert source.shape(name) == expected.shape
    found = source.read(name)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("source_format", ["auto", "awq", "huggingface-safetensor"])
def test_awq(write, rng, source_format):
    parts, weight = make_awq(rng, 24, 96, 32)
    plain = {"norm.weight": np.ones(3, np.float16), "m.bias": np.ones(24, np.float16)}
    source = write(under("m", parts) | plain, AWQ, source_format)
    check(source, "m.weight", weight)
    assert sorted(source.names()) == ["m.bias", "m.weight", "norm.weight"]
    assert source.read("norm.weight").dtype == np.float16
    assert isinstance(source, EncodedSource)
    kept = source.read_encoded("m.weight")
    assert isinstance(kept, AwqArrays)
    for part, array in parts.items():
        np.testing.assert_array_equal(getattr(kept, part), array)
    assert source.read_encoded("norm.weight") is None
    assert source.encoding("m.weight") is None


def test_awq_with_one_group_and_its_own_file(tmp_path, rng):
    parts, weight = make_awq(rng, 8, 64, 64)
    (tmp_path / "config.json").write_text("{}")
    settings = {"w_bit": 4, "q_group_size": -1, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(settings))
    whole = {name: np.ascontiguousarray(array) for name, array in under("m", parts).items()}
    save_file(whole, tmp_path / "model.safetensors")
    check(open_source(tmp_path), "m.weight", weight)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(write, rng, bits, act_order, version):
    parts, weight = make_gptq(rng, 32, 96, 32, bits, act_order=act_order, version=version)
    settings = {**GPTQ, "bits": bits, "desc_act": act_order}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    check(write(under("m", parts), settings), "m.weight", weight)


@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_without_g_idx(write, rng, group_size):
    parts, weight = make_gptq(rng, 8, 64, group_size, 4)
    del parts["g_idx"]
    source = write(under("m", parts), {**GPTQ, "group_size": group_size})
    check(source, "m.weight", weight)
    assert source.read_encoded("m.weight") is None


def test_large_weights_are_decoded_in_blocks(write, rng, monkeypatch):
    monkeypatch.setattr("mlc_llm.weights.packed_decode._BLOCK_VALUES", 32 * 40)
    parts, weight = make_gptq(rng, 32, 96, 32, 3, act_order=True)
    check(write(under("m", parts), {**GPTQ, "bits": 3}), "m.weight", weight)
    parts, weight = make_awq(rng, 24, 96, 32)
    check(write(under("m", parts), AWQ), "m.weight", weight)


@pytest.mark.parametrize("block", [[16, 8], [128, 128], [5, 7]])
def test_block_scaled_fp8(write, rng, block):
    values, scale, weight = make_float8(rng, 40, 24, block)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    extra = {"m.activation_scale": np.float32(0.5).reshape(1), "k_scale": np.ones(1, np.float32)}
    extra["head.weight"] = np.ones((2, 2), ml_dtypes.bfloat16)
    source = write({"m.weight": values, "m.weight_scale_inv": scale} | extra, settings)
    check(source, "m.weight", weight)
    assert sorted(source.names()) == ["head.weight", "m.weight"]
    kept = source.read_encoded("m.weight")
    assert isinstance(kept, Float8Blocks)
    np.testing.assert_array_equal(kept.weight, values)
    np.testing.assert_array_equal(kept.scale, scale)
    assert kept.activation_scale == 0.5


def test_block_scaled_fp8_of_stacked_experts(write, rng):
    made = [make_float8(rng, 12, 10, (4, 4)) for _ in range(3)]
    values, scale, weight = (np.stack(arrays) for arrays in zip(*made, strict=True))
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    source = write({"e.weight": values, "e.weight_scale_inv": scale}, settings)
    check(source, "e.weight", weight)
    assert source.read_encoded("e.weight") is None


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_with_one_scale(write, rng, dtype, shape, name):
    values, scale, weight = make_float8(rng, 8, 6, None, dtype)
    tensors = {"m.weight": values, f"m.{name}": scale.reshape(shape)}
    tensors["m.input_scale"] = np.ones((), np.float32)
    source = write(tensors, {"quant_method": "fp8"})
    check(source, "m.weight", weight)
    assert source.names() == ["m.weight"]


def compressed(layout, **weights):
    group = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_pack_quantized(write, rng, bits, symmetric, group_size):
    parts, weight = make_packed_rows(rng, 16, 64, group_size, bits, symmetric=symmetric)
    strategy = "channel" if group_size == -1 else "group"
    settings = compressed(
        "pack-quantized",
        num_bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=None if group_size == -1 else group_size,
    )
    check(write(under("m", parts), settings), "m.weight", weight)


def test_pack_quantized_with_groups_by_activation(write, rng):
    parts, weight = make_packed_rows(rng, 8, 64, 16, 4)
    order = rng.permutation(64)
    packed, shuffled = make_packed_rows(np.random.default_rng(3), 8, 64, 16, 4)
    del parts, weight
    wide = packed["weight_scale"].astype(np.float32)
    group = (np.arange(64) // 16)[order]
    codes = shuffled / np.repeat(wide, 16, axis=1)
    expected = (np.rint(codes) * wide[:, group]).astype(np.float32)
    packed["weight_g_idx"] = group.astype(np.int32)
    settings = compressed("pack-quantized", strategy="group", group_size=16)
    check(write(under("m", packed), settings), "m.weight", expected)


def test_float_and_int_quantized(write, rng):
    values, _, _ = make_float8(rng, 8, 6, None)
    scale = rng.uniform(0.5, 2, (8, 1)).astype(np.float32)
    weight = values.astype(np.float32) * scale
    tensors = {"m.weight": values, "m.weight_scale": scale.astype(np.float32)}
    settings = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    check(write(tensors, settings), "m.weight", weight)
    codes = rng.integers(-128, 128, (8, 6), dtype=np.int8)
    settings = compressed("int-quantized", num_bits=8, strategy="channel")
    source = write({"m.weight": codes, "m.weight_scale": scale}, settings)
    check(source, "m.weight", codes.astype(np.float32) * scale)


def test_mxfp4(write, rng):
    parts, weight = make_mxfp4(rng, 2, 6, 3)
    tensors = {f"mlp.experts.down_proj_{part}": array for part, array in parts.items()}
    tensors["mlp.experts.down_proj_bias"] = np.ones((2, 6), ml_dtypes.bfloat16)
    source = write(tensors, {"quant_method": "mxfp4"})
    check(source, "mlp.experts.down_proj", weight)
    assert len(source.names()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes', which cannot be read"),
        ({}, "quantized by None"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' is not supported"),
        ({**AWQ, "bits": 8}, "AWQ has 4 bits, not 8"),
        ({**GPTQ, "bits": 5}, "GPTQ of 5 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "dynamic": {"x": {"bits": 8}}}, "dynamic is not supported"),
        (compressed("marlin-24"), "format 'marlin-24' is not supported"),
        (compressed("nvfp4-pack-quantized"), "'nvfp4-pack-quantized' is not supported"),
        (compressed("pack-quantized", num_bits=3), "packed weights of 3 bits"),
        ({**compressed("float-quantized"), "config_groups": {}}, "config_groups must name one"),
    ],
)
def test_what_is_not_supported_is_named(write, settings, message):
    if settings:
        with pytest.raises(UnsupportedModel, match=message):
            write({"m.weight": np.ones(2, np.float32)}, settings)
    else:
        with pytest.raises(UnsupportedModel, match=message):
            write({"m.weight": np.ones(2, np.float32)}, {"bits": 4})


@pytest.mark.parametrize(
    "settings",
    [
        {**AWQ, "group_size": "many"},
        {**AWQ, "group_size": 0},
        {"quant_method": "gptq"},
        {"quant_method": "fp8", "weight_block_size": [0, 1]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {**compressed("pack-quantized"), "config_groups": {"a": 1}},
        [1],
    ],
)
def test_senseless_settings(write, settings):
    with pytest.raises(CorruptFile):
        write({"m.weight": np.ones(2, np.float32)}, settings)


def test_awq_was_asked_for(write):
    with pytest.raises(UnsupportedModel, match="is no AWQ checkpoint"):
        write({"m.weight": np.ones(2, np.float32)}, None, "awq")


@pytest.mark.parametrize("missing", ["qzeros", "scales"])
def test_missing_parts_are_named(write, rng, missing):
    parts, _ = make_awq(rng, 8, 64, 32)
    del parts[missing]
    with pytest.raises(ParameterMismatch, match=rf"m\.qweight .* m\.{missing} is not there"):
        write(under("m", parts), AWQ)


@pytest.mark.parametrize(
    ("part", "array", "error"),
    [
        ("scales", np.ones((2, 7), np.float16), ParameterMismatch),
        ("scales", np.ones((3, 8), np.float16), ParameterMismatch),
        ("scales", np.ones(8, np.float16), ParameterMismatch),
        ("qzeros", np.ones((2, 2), np.int32), ParameterMismatch),
        ("qweight", np.ones((64, 1), np.float32), UnsupportedModel),
        ("scales", np.ones((2, 8), np.int32), UnsupportedModel),
        ("weight", np.ones((8, 64), np.float16), ParameterMismatch),
    ],
)
def test_parts_that_do_not_fit(write, rng, part, array, error):
    parts, _ = make_awq(rng, 8, 64, 32)
    with pytest.raises(error, match=r"m\b"):
        write(under("m", {**parts, part: array}), AWQ)


@pytest.mark.parametrize("value", [-1, 3, 1 << 30])
def test_groups_that_are_not_there(write, rng, value):
    parts, _ = make_gptq(rng, 8, 96, 32, 4)
    parts["g_idx"][5] = value
    source = write(under("m", parts), GPTQ)
    with pytest.raises(CorruptFile, match=r"m\.weight: g_idx names groups"):
        source.read("m.weight")


def test_fp8_without_its_scale(write, rng):
    values, _, _ = make_float8(rng, 8, 6, None)
    with pytest.raises(ParameterMismatch, match="tensors of m do not fit"):
        write({"m.weight": values}, {"quant_method": "fp8"})


def test_a_whole_gptq_model_converts(tmp_path):
    original = HuggingFaceSource(REFERENCES / "llama_gqa")
    directory, plain = tmp_path / "gptq", tmp_path / "plain"
    rng = np.random.default_rng(6)
    packed, weights = {}, {}
    for name in original.names():
        weights[name] = original.read(name)
        if not name.endswith("_proj.weight"):
            packed[name] = weights[name]
            continue
        module = name.removesuffix(".weight")
        parts, weights[name] = make_gptq(rng, *weights[name].shape, 32, 4, act_order=True)
        packed |= under(module, parts)
        # Some programs store biases that do nothing.
        packed[f"{module}.bias"] = np.zeros(len(weights[name]), np.float16)
    for path, tensors, settings in ((directory, packed, GPTQ), (plain, weights, None)):
        path.mkdir()
        config = {**original.config, "quantization_config": settings}
        (path / "config.json").write_text(json.dumps(config))
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(whole, path / "model.safetensors")
    family = find_family(original.config)
    config = family.config_from_huggingface(original.config)
    plan = plan_parameters(family, config, get_scheme("q4f32_1"))
    made = []
    for path in (directory, plain):
        convert(plan, open_source(path), path / "out", lambda done, total, name: None)
        made.append((path / "out" / "params_shard_0.bin").read_bytes())
    assert made[0] == made[1]
    packed[f"{module}.bias"][3] = 1
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in packed.items()},
        directory / "model.safetensors",
    )
    with pytest.raises(ParameterMismatch, match=rf"surplus {re.escape(module)}\.bias;"):
        convert(plan, open_source(directory), tmp_path / "no", lambda done, total, name: None)


def test_random_settings_raise_only_our_errors(write, rng):
    parts, weight = make_gptq(rng, 32, 96, 32, 4)
    values, scale, _ = make_float8(rng, 32, 96, (8, 8))
    float8 = {"f.weight": values, "f.weight_scale_inv": scale}
    block_scaled = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    checkpoints = ((under("m", parts), GPTQ), (float8, block_scaled))
    choices = [None, 0, -1, 1, 3, 4, 8, 32, 1 << 62, 0.5, "x", "gptq", "fp8", [8, 8], {}, True]
    choices += ["awq", "compressed-tensors", "int-quantized", "pack-quantized", "channel"]
    loaded = 0
    names = ("quant_method", "bits", "group_size", "checkpoint_format", "weight_block_size")
    for number in range(200):
        tensors, right = checkpoints[number % 2]
        settings = dict(right)
        for name in rng.choice(names, 2):
            settings[str(name)] = choices[rng.integers(len(choices))]
        try:
            source = write(tensors, settings)
            for name in source.names():
                assert source.read(name).size <= weight.size * 4
            loaded += isinstance(source, DequantizedSource)
        except MlcError:
            continue
    assert 0 < loaded < 150
