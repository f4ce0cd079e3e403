"""Safetensors directories: dtypes, shards, and everything that can be wrong with them."""

import json
import random
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlc_llm.errors import (
    CorruptFile,
    MlcError,
    ModelNotFound,
    ParameterMismatch,
    UnsupportedModel,
)
from mlc_llm.weights.huggingface import HuggingFaceSource


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_sharded(directory, tensors):
    names = list(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [names[:1], names[1:]]
    weight_map = {}
    for file_name, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / file_name)
        weight_map.update(dict.fromkeys(part, file_name))
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_every_dtype(hf_dir, tensors, dtype):
    expected = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file(expected, hf_dir / "model.safetensors")
    source = HuggingFaceSource(hf_dir)
    assert source.config == {"model_type": "llama"}
    assert sorted(source.names()) == sorted(tensors)
    for name, tensor in expected.items():
        assert source.shape(name) == tensor.shape
        found = source.read(name)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found, tensor)
    assert source.files() == [hf_dir / "model.safetensors"]


def test_reads_shards(hf_dir, tensors):
    files = write_sharded(hf_dir, tensors)
    source = HuggingFaceSource(hf_dir)
    assert source.files() == [hf_dir / name for name in files]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)
    source.close()
    assert source.names() == []


def test_data_at_an_odd_offset(hf_dir):
    values = np.arange(5, dtype=np.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    write_raw(hf_dir / "model.safetensors", header, values.tobytes())
    np.testing.assert_array_equal(HuggingFaceSource(hf_dir).read("x"), values)


def test_missing_files(hf_dir):
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors nor"):
        HuggingFaceSource(hf_dir)
    (hf_dir / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"config\.json does not exist"):
        HuggingFaceSource(hf_dir)


def test_missing_shard_is_named(hf_dir, tensors):
    files = write_sharded(hf_dir, tensors)
    (hf_dir / files[1]).unlink()
    with pytest.raises(CorruptFile, match=f"{files[1]} is listed in .* but is not there"):
        HuggingFaceSource(hf_dir)


def test_tensor_missing_in_its_shard(hf_dir, tensors):
    files = write_sharded(hf_dir, tensors)
    save_file({"other": np.zeros(2, np.float32)}, hf_dir / files[1])
    with pytest.raises(CorruptFile, match=r"lacks tensor b\.weight"):
        HuggingFaceSource(hf_dir)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", 7, None])
def test_index_may_not_leave_the_directory(hf_dir, name):
    (hf_dir / "model.safetensors").unlink()
    index = {"weight_map": {"x": name}}
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile):
        HuggingFaceSource(hf_dir)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_a_map(hf_dir, index):
    (hf_dir / "model.safetensors").unlink()
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match="no weight_map"):
        HuggingFaceSource(hf_dir)


@pytest.mark.parametrize(
    "entry",
    [
        "text",
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        {"dtype": 3, "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_damaged_entries(hf_dir, entry):
    write_raw(hf_dir / "model.safetensors", {"x": entry}, bytes(8))
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        HuggingFaceSource(hf_dir)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 4) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 1) + b"{",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 40000) + b"[" * 40000,
    ],
)
def test_damaged_headers(hf_dir, content):
    (hf_dir / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        HuggingFaceSource(hf_dir)


def test_truncated_data_says_so(hf_dir):
    path = hf_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="is truncated"):
        HuggingFaceSource(hf_dir)


def test_other_dtypes_are_refused_when_read(hf_dir):
    save_file({"x": np.zeros(3, np.int64)}, hf_dir / "model.safetensors")
    source = HuggingFaceSource(hf_dir)
    with pytest.raises(UnsupportedModel, match=r"tensor x in .* is int64"):
        source.read("x")
    with pytest.raises(ParameterMismatch, match="has no tensor y"):
        source.shape("y")


def test_unknown_dtype(hf_dir):
    entry = {"dtype": "F3", "shape": [1], "data_offsets": [0, 1]}
    write_raw(hf_dir / "model.safetensors", {"x": entry}, bytes(1))
    with pytest.raises(UnsupportedModel, match="unknown dtype 'F3'"):
        HuggingFaceSource(hf_dir)


def test_damage_anywhere_raises_only_our_errors(hf_dir):
    path = hf_dir / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(20240601)
    refused = 0
    for round_number in range(200):
        damaged = bytearray(whole)
        if round_number % 4 == 0:
            damaged = damaged[: rng.randrange(len(whole))]
        else:
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            source = HuggingFaceSource(hf_dir)
            total = sum(source.read(name).nbytes for name in source.names())
            assert total <= len(whole)
        except MlcError:
            refused += 1
    assert refused > 100
