"""Artifacts in MLC LLM's layout from the independent packer are read back as the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlc_packer import CHATML, FORMATS, Format, fuse, pack_artifact, pack_groups
from numpy.typing import NDArray
from numpy_model import read_weights
from reference_cases import get_case

from mlc_llm.artifact import TensorIndex, read_chat_config, read_tensor_index

Array = NDArray[Any]

GROUP_FORMATS = [name for name, form in FORMATS.items() if form.bits]
# With and without lm_head, whole and partial last groups, both names of the fused projection.
MODELS = ["llama_tied", "llama_odd_sizes", "mistral_sliding_window", "qwen2_odd_sizes_old_config"]


def fused_weights(name: str) -> dict[str, Array]:
    case = get_case(name)
    return dict(fuse(case.config(), read_weights(case.directory)))


def unpack_by_loop(words: Array, scale: Array, form: Format, columns: int) -> Array:
    """Take one code at a time out of the words, with Python integers."""
    per_word, mask, zero = 32 // form.bits, 2**form.bits - 1, 2 ** (form.bits - 1) - 1
    values = np.zeros((len(words), columns))
    for row, (row_words, row_scale) in enumerate(zip(words.tolist(), scale.tolist(), strict=True)):
        for column in range(columns):
            code = row_words[column // per_word] >> (column % per_word * form.bits) & mask
            values[row, column] = (code - zero) * row_scale[column // form.group_size]
    return values


def read_matrix(index: TensorIndex, base: str, form: Format, columns: int) -> tuple[Array, Array]:
    """Return a dequantized matrix (out, in) and the scale of each of its elements."""
    words, scale = index.read(base + ".q_weight"), index.read(base + ".q_scale")
    assert words.dtype == np.uint32 and scale.dtype == form.dtype
    if form.transposed and base != "model.embed_tokens":
        words, scale = words.T, scale.T
    num_groups = -(-columns // form.group_size)
    words_per_group = form.group_size // (32 // form.bits)
    assert (words.shape[1], scale.shape[1]) == (words_per_group * num_groups, num_groups)
    step = np.repeat(scale.astype(np.float64), form.group_size, axis=1)[:, :columns]
    return unpack_by_loop(words, scale.astype(np.float64), form, columns), step


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantization", GROUP_FORMATS)
def test_quantized_weights_read_back(model: str, quantization: str, tmp_path: Path) -> None:
    form = FORMATS[quantization]
    pack_artifact(get_case(model).directory, tmp_path, quantization)
    index = read_tensor_index(tmp_path)
    index.verify_checksums()
    expected_names = set()
    for name, weight in fused_weights(model).items():
        if weight.ndim == 1:
            assert np.allclose(index.read(name), weight, rtol=2**-8)
            expected_names.add(name)
            continue
        base = name.removesuffix(".weight")
        expected_names |= {base + ".q_weight", base + ".q_scale"}
        found, step = read_matrix(index, base, form, weight.shape[1])
        # Half a step, and the rounding of weights to float16 or of scales to bfloat16 on disk.
        slack = 2**-8 if quantization == "q4f32_1" else 2**-10
        assert (np.abs(found - weight) <= 0.5 * step + slack * (np.abs(weight) + step)).all()
    assert set(index.records) == expected_names


@pytest.mark.parametrize(("quantization", "bound"), [("q0f16", 2**-11), ("q0bf16", 2**-8)])
def test_unquantized_weights_read_back(quantization: str, bound: float, tmp_path: Path) -> None:
    pack_artifact(get_case("qwen2_gqa").directory, tmp_path, quantization)
    index = read_tensor_index(tmp_path)
    weights = fused_weights("qwen2_gqa")
    assert set(index.records) == set(weights)
    for name, weight in weights.items():
        found = index.read(name)
        assert found.dtype == FORMATS[quantization].dtype
        assert np.allclose(found.astype(np.float32), weight, rtol=bound, atol=1e-7)


def test_float32_has_bfloat16_precision_on_disk(tmp_path: Path) -> None:
    pack_artifact(get_case("qwen2_tied_bf16").directory, tmp_path, "q0f32")
    index = read_tensor_index(tmp_path)
    for name, weight in fused_weights("qwen2_tied_bf16").items():
        record = index.records[name]
        assert record.spec.dtype == "float32" and record.size_bytes == 2 * weight.size
        assert np.array_equal(index.read(name), weight.astype(np.float32))


@pytest.mark.parametrize("index_name", ["tensor-cache.json", "ndarray-cache.json"])
def test_either_index_name(index_name: str, tmp_path: Path) -> None:
    directory = get_case("llama_gqa").directory
    pack_artifact(directory, tmp_path, "q4f16_1", index_name=index_name)
    assert sorted(path.name for path in tmp_path.glob("*-cache.json")) == [index_name]
    data = json.loads((tmp_path / index_name).read_text())
    records = [record for shard in data["records"] for record in shard["records"]]
    assert {record["format"] for record in records} == {"f32-to-bf16"}
    assert data["metadata"]["ParamSize"] == len(records) == len(read_tensor_index(tmp_path).records)
    assert 4.5 < data["metadata"]["BitsPerParam"] < 4.7


def test_small_shards_hold_the_same_weights(tmp_path: Path) -> None:
    directory, cap = get_case("llama_gqa").directory, 6000
    pack_artifact(directory, tmp_path / "one", "q4f16_1")
    pack_artifact(directory, tmp_path / "many", "q4f16_1", shard_cap_bytes=cap)
    one, many = read_tensor_index(tmp_path / "one"), read_tensor_index(tmp_path / "many")
    assert len(one.shard_md5) == 1 and len(many.shard_md5) > 3
    many.verify_checksums()
    for path in many.shard_md5:
        held = [record for record in many.records.values() if record.path == path]
        assert path.stat().st_size < cap or len(held) == 1
    assert set(one.records) == set(many.records)
    for name in one.records:
        assert np.array_equal(one.read(name), many.read(name))


def test_chat_config_is_read(tmp_path: Path) -> None:
    pack_artifact(get_case("llama_rope_llama3").directory, tmp_path, "q3f16_1")
    config = read_chat_config(tmp_path)
    assert (config.model_type, config.quantization) == ("llama", "q3f16_1")
    assert (config.context_window_size, config.prefill_chunk_size) == (256, 256)
    assert config.model_config["rope_scaling"]["rope_type"] == "llama3"
    assert config.model_config["position_embedding_base"] == 10000.0
    assert config.model_config["head_dim"] == 16
    assert config.conv_template == CHATML
    assert config.active_vocab_size == config.vocab_size == 131
    assert config.tokenizer_info["token_postproc_method"] == "byte_level"
    assert config.tokenizer_files == ["tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / name).is_file() for name in config.tokenizer_files)


def test_sliding_window_stands_for_context(tmp_path: Path) -> None:
    pack_artifact(get_case("mistral_sliding_window").directory, tmp_path, "q0f16")
    config = read_chat_config(tmp_path)
    assert (config.context_window_size, config.sliding_window_size) == (-1, 8)
    assert config.attention_sink_size == 4


def test_words_worked_out_by_hand() -> None:
    # int4, scale 1: codes are value + 7, the first in the lowest bits; absent columns are 0.
    words, scale = pack_groups(
        np.array([[-7.0, 7.0, 0.0, 1.0, 2.4]], np.float16), FORMATS["q4f16_1"]
    )
    assert scale.tolist() == [[1.0]]
    assert [hex(word) for word in words[0].tolist()] == ["0x987e0", "0x0", "0x0", "0x0"]
    # int3: ten codes of value / 2 + 3 in 30 bits, the eleventh opens the second word.
    row = np.array([[-6, 6, 0, 2, 4, -2, -4, 0, 0, 6, 6.0]], np.float16)
    words, scale = pack_groups(row, FORMATS["q3f16_1"])
    assert scale.tolist() == [[2.0]]
    codes = [0, 6, 3, 4, 5, 2, 1, 3, 3, 6]
    assert words[0].tolist() == [sum(code << 3 * i for i, code in enumerate(codes)), 6, 0, 0]
    # A group of zeros has scale 0 and holds the zero point.
    words, scale = pack_groups(np.zeros((1, 32), np.float16), FORMATS["q4f16_1"])
    assert scale.tolist() == [[0.0]] and words.tolist() == [[0x77777777] * 4]


@pytest.mark.parametrize("quantization", [name for name, form in FORMATS.items() if form.store])
def test_eight_bit_floats_are_those_of_the_converter(quantization: str, tmp_path: Path) -> None:
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.prepare.resolve import convert_weights

    # A checkpoint in the scheme's own dtype: nothing is rounded before it is quantized.
    is_bfloat16 = FORMATS[quantization].dtype != np.float16
    directory = get_case("qwen2_tied_bf16" if is_bfloat16 else "llama_gqa_f16").directory
    pack_artifact(directory, tmp_path / "theirs", quantization)
    convert_weights(
        directory, tmp_path / "ours", quantization=quantization, progress=NullProgress()
    )
    theirs, ours = read_tensor_index(tmp_path / "theirs"), read_tensor_index(tmp_path / "ours")
    theirs.check([record.spec for record in ours.records.values()], "theirs")
    for name in ours.records:
        one, other = ours.read(name), theirs.read(name)
        if one.dtype == np.float32:
            # Scales have bfloat16 precision on their disk.
            assert np.allclose(one, other, rtol=2**-8)
        else:
            assert np.array_equal(one.view(np.uint8), other.view(np.uint8))
