"""PyTorch checkpoints: both containers, hostile pickles, damage. The files are PyTorch's own."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damage import count_refusals, damaged_copies

from mlc_llm.errors import CorruptFile, MlcError, ModelNotFound, UnsupportedModel
from mlc_llm.weights.huggingface import TORCH, HuggingFaceSource
from mlc_llm.weights.open import open_source
from mlc_llm.weights.torch_file import read_torch_file

FILES = Path(__file__).parent / "torch_files"
WHOLE = np.arange(12, dtype=np.float32).reshape(3, 4) / 4
EXPECTED = {
    "float32": WHOLE,
    "tied": WHOLE,
    "part": WHOLE[1:, 1:3],
    "transposed": (np.arange(15) - 7).reshape(5, 3).astype(ml_dtypes.bfloat16).T,
    "float16": np.array([[0.5, -2.0], [65504.0, 6e-8]], np.float16),
    "float64": np.array([0.1, -1e30]),
    "parameter": np.ones(2, np.float32),
    "int64": np.array([-1, 1 << 40]),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", ["archive.bin", "stream.bin", "protocol_4.bin"])
def test_reads_what_pytorch_wrote(name):
    tensors = read_torch_file(FILES / name)
    assert list(tensors) == list(EXPECTED)
    for key, expected in EXPECTED.items():
        found = tensors[key].read()
        assert (tensors[key].dtype, tensors[key].shape) == (str(expected.dtype), expected.shape)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_float8_and_nested_state_dictionaries():
    found = read_torch_file(FILES / "float8.bin")["float8"].read()
    np.testing.assert_array_equal(found.astype(np.float32), [0.5, -448.0, 0.0625])
    nested = read_torch_file(FILES / "state_dict.bin")
    np.testing.assert_array_equal(nested["weight"].read(), np.full((2, 2), 0.25))
    np.testing.assert_array_equal(nested["bias"].read(), np.full(2, 4.0))


def test_stored_values_are_mapped_and_cannot_be_written():
    for name in ("archive.bin", "stream.bin"):
        found = read_torch_file(FILES / name)["part"].read()
        owner = found
        while owner.base is not None and not isinstance(owner, np.memmap):
            owner = owner.base
        assert isinstance(owner, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 1


def rezip(source, path, changes=None, method=zipfile.ZIP_STORED):
    """Write an archive again with other members or another compression."""
    changes = changes or {}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            content = changes.get(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name in set(changes) - set(old.namelist()):
            new.writestr(name, changes[name])
    return path


def test_compressed_archives(tmp_path):
    path = rezip(FILES / "archive.bin", tmp_path / "c.bin", method=zipfile.ZIP_DEFLATED)
    for name, tensor in read_torch_file(path).items():
        np.testing.assert_array_equal(tensor.read(), EXPECTED[name])


def test_a_whole_module_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"'torch\.nn\.modules\.linear\.Linear'.*not run"):
        read_torch_file(FILES / "module.bin")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"archive/byteorder": b"big"}, UnsupportedModel, "big-endian"),
        ({"archive/constants.pkl": b""}, UnsupportedModel, "TorchScript"),
        ({"archive/data.pkl": None}, CorruptFile, "without a description"),
        ({"archive/data/0": None}, CorruptFile, "lacks the values of 'float32'"),
        ({"archive/data/0": b"abc"}, CorruptFile, "has 3 bytes, 48 are described"),
        ({"archive/data.pkl": pickle.dumps([1])}, UnsupportedModel, "no dictionary of tensors"),
        ({"archive/data.pkl": pickle.dumps({"a": 1})}, UnsupportedModel, "'a' is a int"),
    ],
)
def test_archives_that_are_no_checkpoints(tmp_path, changes, error, message):
    path = rezip(FILES / "archive.bin", tmp_path / "c.bin", changes)
    with pytest.raises(error, match=message):
        read_torch_file(path)


class Hostile:
    """Pickles into a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive_of(path, described):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", described)
        archive.writestr("archive/data/0", bytes(64))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {}", r"\w+\.system"),
        (eval, "open({!r}, 'w')", r"\w+\.eval"),
        (exec, "open({!r}, 'w')", r"\w+\.exec"),
        (open, "{}", r"\w+\.open"),
    ],
)
def test_hostile_pickles_run_nothing(tmp_path, protocol, function, argument, name):
    mark = tmp_path / "was-run"
    described = pickle.dumps({"x": Hostile(function, argument.format(str(mark)))}, protocol)
    for content in (archive_of(tmp_path / "a.bin", described).read_bytes(), described):
        (tmp_path / "b.bin").write_bytes(content)
        with pytest.raises((UnsupportedModel, CorruptFile)) as caught:
            read_torch_file(tmp_path / "b.bin")
    archive_of(tmp_path / "a.bin", described)
    with pytest.raises((UnsupportedModel, CorruptFile)) as caught:
        read_torch_file(tmp_path / "a.bin")
    if protocol:
        assert caught.match(name)
    assert not mark.exists()


GLOBALS = {
    "ordered": b"ccollections\nOrderedDict\n",
    "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "storage": b"ctorch\nFloatStorage\n",
}


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_pickle(offset=b"K\x00", shape=b"K\x02\x85", strides=b"K\x01\x85", count=b"K\x10"):
    """Return a pickle of one tensor on a storage of 16 values, with parts replaced."""
    reference = (
        b"(" + text("storage") + GLOBALS["storage"] + text("0") + text("cpu") + count + b"tQ"
    )
    arguments = b"(" + reference + offset + shape + strides + b"\x89" + b"NtR"
    return b"\x80\x02}" + text("x") + GLOBALS["rebuild"] + arguments + b"s."


def test_hand_made_pickle(tmp_path):
    found = read_torch_file(archive_of(tmp_path / "a.bin", tensor_pickle()))["x"].read()
    np.testing.assert_array_equal(found, np.zeros(2, np.float32))


HUGE = b"\x8a\x08" + struct.pack("<Q", 1 << 60)


@pytest.mark.parametrize(
    "described",
    [
        b"",
        b"\x80\x02",
        b"\x80\x09N.",
        b"\x80\x02.",
        b"\x80\x02(.",
        b"\x80\x02)R.",
        b"\x80\x02h\x07.",
        b"\x80\x02Ns.",
        b"\x80\x02}NNs.",
        b"\x80\x02}]Ns.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02u.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", (1 << 64) - 1) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        b"\x80\x02cno end of a name" + b"x" * 400,
        b"\x80\x02}" + GLOBALS["ordered"] + b"K\x01\x85R.",
        b"\x80\x02]K\x01aQ.",
        b"\x80\x02r\xff\xff\xff\xff.",
        tensor_pickle(offset=b"K\x0f"),
        tensor_pickle(offset=b"J" + struct.pack("<i", -1)),
        tensor_pickle(offset=HUGE),
        tensor_pickle(shape=HUGE + b"\x85"),
        tensor_pickle(shape=b"(" + HUGE * 8 + b"t", strides=b"(" + b"K\x00" * 8 + b"t"),
        tensor_pickle(shape=b"K\x11\x85", strides=b"K\x00\x85"),
        tensor_pickle(strides=b"K\x0f" + b"K\x01\x86"),
        tensor_pickle(strides=b"K\x10\x85"),
        tensor_pickle(strides=b"J" + struct.pack("<i", -1) + b"\x85"),
        tensor_pickle(strides=HUGE + b"\x85"),
        tensor_pickle(count=HUGE),
        tensor_pickle(count=b"K\x11"),
    ],
)
def test_damaged_pickles(tmp_path, described):
    with pytest.raises(CorruptFile, match=r"a\.bin"):
        read_torch_file(archive_of(tmp_path / "a.bin", described))


def test_what_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mlc_llm.weights.torch_pickle._MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UnsupportedModel, match="pickle of more than"):
        read_torch_file(archive_of(tmp_path / "a.bin", b"\x80\x02" + b"N" * 2000 + b"."))


@pytest.mark.parametrize("content", [b"", b"P", b"PK\x03\x04", b"\x80\x02", b"hello", bytes(100)])
def test_other_files(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"x\.bin"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["archive.bin", "stream.bin", "protocol_4.bin", "float8.bin"])
def test_damage_anywhere_raises_only_our_errors(tmp_path, name):
    path = tmp_path / "damaged.bin"

    def use(content):
        path.write_bytes(content)
        total = sum(tensor.read().nbytes for tensor in read_torch_file(path).values())
        assert total < 100 * len(content)

    whole = (FILES / name).read_bytes()
    assert count_refusals(damaged_copies(whole, 31, 300), use) > 100


def test_truncated_streams_say_so(tmp_path):
    whole = (FILES / "stream.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[:-1])
    with pytest.raises(CorruptFile, match="is truncated: values end at"):
        read_torch_file(tmp_path / "x.bin")


def write_archive(path, tensors):
    """Write float32 tensors as PyTorch does, without PyTorch."""
    described = io.BytesIO()
    described.write(b"\x80\x02}")
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, tensor) in enumerate(tensors.items()):
            strides = [stride // 4 for stride in tensor.strides]
            numbers = [b"J" + struct.pack("<i", n) for n in (*tensor.shape, *strides)]
            shape, stride = numbers[: tensor.ndim], numbers[tensor.ndim :]
            described.write(text(name) + GLOBALS["rebuild"] + b"((" + text("storage"))
            described.write(GLOBALS["storage"] + text(str(number)) + text("cpu"))
            described.write(b"J" + struct.pack("<i", tensor.size) + b"tQK\x00(")
            described.write(b"".join(shape) + b"t(" + b"".join(stride) + b"t\x89NtRs")
            archive.writestr(f"archive/data/{number}", tensor.tobytes())
        archive.writestr("archive/data.pkl", described.getvalue() + b".")


@pytest.fixture
def torch_dir(hf_dir, tensors):
    (hf_dir / "model.safetensors").unlink()
    write_archive(hf_dir / "pytorch_model.bin", tensors)
    return hf_dir


@pytest.mark.parametrize("source_format", ["auto", "huggingface-torch"])
def test_huggingface_directory(torch_dir, tensors, source_format):
    source = open_source(torch_dir, source_format)
    assert sorted(source.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)
    assert source.files() == [torch_dir / "pytorch_model.bin"]


def test_sharded_directory(torch_dir, tensors):
    (torch_dir / "pytorch_model.bin").unlink()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:1], names[1:]), start=1):
        file_name = f"pytorch_model-0000{number}-of-00002.bin"
        write_archive(torch_dir / file_name, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file_name))
    index = torch_dir / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(torch_dir)
    assert len(source.files()) == 2
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)
    (torch_dir / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CorruptFile, match=r"listed in pytorch_model\.bin\.index\.json but is not"):
        open_source(torch_dir)


def test_safetensors_are_preferred(torch_dir, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, torch_dir / "model.safetensors")
    assert open_source(torch_dir).files() == [torch_dir / "model.safetensors"]
    chosen = open_source(torch_dir, "huggingface-torch")
    assert chosen.files() == [torch_dir / "pytorch_model.bin"]
    (torch_dir / "pytorch_model.bin").unlink()
    with pytest.raises(ModelNotFound, match=r"neither pytorch_model\.bin nor"):
        open_source(torch_dir, "huggingface-torch")


def test_doubles_become_float32_and_integers_are_refused(hf_dir):
    (hf_dir / "pytorch_model.bin").write_bytes((FILES / "archive.bin").read_bytes())
    source = HuggingFaceSource(hf_dir, TORCH)
    np.testing.assert_array_equal(source.read("float64"), np.array([0.1, -1e30], np.float32))
    with pytest.raises(MlcError, match=r"tensor int64 in .* is int64"):
        source.read("int64")
    assert source.dtype("int64") == "int64"
    np.testing.assert_array_equal(source.read_stored("int64"), EXPECTED["int64"])
