"""The GGUF container: metadata, splits, and damage of every sort."""

import random
import struct

import gguf
import numpy as np
import pytest
from make_gguf import add_value, finish, make_tensors, write_gguf

from mlc_llm.errors import CorruptFile, MlcError, UnsupportedModel
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.gguf_file import GGUFFile


def write_values(path, values, **options):
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value in values.items():
        add_value(writer, key, value)
    finish(writer)
    return path


def header(num_tensors=0, num_metadata=0, version=3):
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_metadata)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def test_metadata_of_every_type(tmp_path):
    values = {
        "number": 7,
        "real": 0.5,
        "flag": True,
        "text": "käse",
        "numbers": [1, 2, 3],
        "flags": [True, False],
        "texts": ["a", "", "▁b"],
    }
    file = GGUFFile(write_values(tmp_path / "m.gguf", values))
    assert {key: file.metadata[key] for key in values} == values
    assert file.get("number", int) == 7
    assert file.get("absent", str, "default") == "default"
    for key, kind in (("text", int), ("flag", int), ("number", str)):
        with pytest.raises(CorruptFile, match=f"metadata {key} is .* which is no {kind.__name__}"):
            file.get(key, kind)


def test_alignment_is_honoured(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(128)
    values = np.arange(5, dtype=np.float32)
    writer.add_tensor("x", values)
    writer.add_tensor("y", values + 1)
    finish(writer)
    file = GGUFFile(tmp_path / "m.gguf")
    assert [tensor.offset % 128 for tensor in file.tensors.values()] == [0, 0]
    np.testing.assert_array_equal(file.read("y"), values + 1)


def write_split(directory, count=3):
    for number in range(1, count + 1):
        path = directory / f"model-{number:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.count", count)
        if number == 1:
            writer.add_string("only.first", "yes")
        writer.add_tensor(f"t{number}", np.full(4, number, np.float32))
        finish(writer)
    return sorted(directory.glob("*.gguf"))


def test_split_files_are_read_whole_from_any_part(tmp_path):
    parts = write_split(tmp_path)
    for part in parts:
        file = GGUFFile(part)
        assert file.parts == parts
        assert file.metadata["only.first"] == "yes"
        assert [float(file.read(f"t{n}")[0]) for n in (1, 2, 3)] == [1, 2, 3]


def test_missing_part_of_a_split(tmp_path):
    parts = write_split(tmp_path)
    parts[1].unlink()
    with pytest.raises(CorruptFile, match=r"00002-of-00003\.gguf is missing"):
        GGUFFile(parts[0])
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CorruptFile, match="one of 3 parts"):
        GGUFFile(renamed)


def test_a_tensor_in_two_parts(tmp_path):
    parts = write_split(tmp_path, 2)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CorruptFile, match="holds tensor 't1' a second time"):
        GGUFFile(parts[0])


def test_big_endian_is_refused(tmp_path):
    path = write_values(tmp_path / "m.gguf", {"x": 1}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModel, match="big-endian"):
        GGUFFile(path)


def test_other_versions_are_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header(version=1))
    with pytest.raises(UnsupportedModel, match="GGUF version 1"):
        GGUFFile(tmp_path / "m.gguf")


TENSOR = string("x") + struct.pack("<I", 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"ELF!" + bytes(40),
        header(num_tensors=1 << 60),
        header(num_metadata=1 << 60),
        header(num_metadata=1),
        header(num_metadata=1) + struct.pack("<Q", 1 << 62),
        header(num_metadata=1) + string("k") + struct.pack("<I", 99),
        header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 61),
        header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 4, 1 << 61),
        header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 4, 1 << 20),
        header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 9, 1),
        header(num_metadata=1) + string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe",
        header(num_metadata=2) + 2 * (string("k") + struct.pack("<IB", 0, 1)),
        header(num_metadata=1) + string("general.alignment") + struct.pack("<II", 4, 33),
        header(num_tensors=1) + string("x") + struct.pack("<I", 5) + bytes(64),
        header(num_tensors=1) + string("x") + struct.pack("<IIQ", 0, 0, 0),
        header(num_tensors=1) + TENSOR + struct.pack("<QIQ", 0, 0, 0),
        header(num_tensors=1) + TENSOR + struct.pack("<QIQ", 1 << 63, 0, 0),
        header(num_tensors=1) + TENSOR + struct.pack("<QIQ", 1 << 30, 0, 0),
        header(num_tensors=1) + TENSOR + struct.pack("<QIQ", 1, 0, (1 << 64) - 1),
        header(num_tensors=1) + TENSOR + struct.pack("<QIQ", 33, 2, 0) + bytes(64),
    ],
)
def test_damaged_headers(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"m\.gguf"):
        GGUFFile(tmp_path / "m.gguf")


def test_unknown_encoding(tmp_path):
    content = header(num_tensors=1) + TENSOR + struct.pack("<QIQ", 1, 999, 0) + bytes(64)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="unknown encoding 999"):
        GGUFFile(tmp_path / "m.gguf")


def test_truncated_data_says_so(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_tensors())
    size = max(t.offset + t.size_bytes for t in GGUFFile(path).tensors.values())
    path.write_bytes(path.read_bytes()[: size - 1])
    with pytest.raises(CorruptFile, match="is truncated"):
        GGUFFile(path)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(CorruptFile, match="cannot be read"):
        GGUFFile(tmp_path)


def test_damage_anywhere_raises_only_our_errors(tmp_path):
    path = tmp_path / "m.gguf"
    kind = gguf.GGMLQuantizationType.Q4_1
    factors = {"rope_freqs.weight": np.full(8, 4.0, np.float32)}
    metadata = {"rope.scaling.type": "none", "attention.head_count_kv": [2, 2]}
    write_gguf(path, make_tensors() | factors, quantization=kind, metadata=metadata)
    whole = path.read_bytes()
    data_begin = 2048
    rng = random.Random(20240602)
    refused = 0
    for round_number in range(240):
        damaged = bytearray(whole)
        if round_number % 4 == 0:
            damaged = damaged[: rng.randrange(len(whole))]
        else:
            reach = len(whole) if round_number % 4 == 1 else data_begin
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            source = GGUFSource(path)
            total = sum(source.read(name).nbytes for name in source.names())
            assert total < 40 * len(whole)
        except MlcError:
            refused += 1
    assert refused > 120
