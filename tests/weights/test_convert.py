"""Conversion: what is written, what is refused before, and what is left after an accident."""

import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlc_llm.artifact import SHARD_LIMIT_BYTES, TensorSpec, numpy_dtype, read_tensor_index
from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, StorageError
from mlc_llm.models.plan import ParamPlan, ParamRule
from mlc_llm.quantization.group import dequantize_group, packed_specs, quantize_group
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.weights.convert import convert
from mlc_llm.weights.huggingface import HuggingFaceSource
from mlc_llm.weights.shards import WORK_NAME, lay_out

SCHEME = get_scheme("q4f16_1")


def plain(name, shape, dtype="float32", sources=None):
    def store(weight):
        return (weight.astype(numpy_dtype(dtype)),)

    rule = ParamRule(tuple(sources or (name,)))
    return ParamPlan(name, shape, rule, (TensorSpec(name, shape, dtype),), store)


def grouped(module, shape, sources):
    def store(weight):
        return quantize_group(weight, SCHEME, transpose=False)

    outputs = packed_specs(module, *shape, SCHEME, transpose=False)
    return ParamPlan(f"{module}.weight", shape, ParamRule(tuple(sources)), outputs, store)


def quiet(done, total, name):
    pass


class Model:
    """A checkpoint of ten matrices, and a plan that fuses two of them."""

    def __init__(self, directory):
        rng = np.random.default_rng(5)
        self.directory = directory
        self.tensors = {
            f"m{n}.weight": rng.standard_normal((8, 64)).astype(np.float32) for n in range(10)
        }
        self.config = {"model_type": "llama"}
        self.plan = [
            grouped("fused", (16, 64), ["m0.weight", "m1.weight"]),
            *(plain(f"m{n}.weight", (8, 64), "float32") for n in range(2, 8)),
            plain("m8.weight", (8, 64), "float16"),
            plain("m9.weight", (8, 64), "bfloat16"),
        ]
        self.save()

    def save(self):
        self.directory.mkdir(exist_ok=True)
        save_file(self.tensors, self.directory / "model.safetensors")
        (self.directory / "config.json").write_text(json.dumps(self.config))

    def source(self):
        return HuggingFaceSource(self.directory)


@pytest.fixture
def model(tmp_path):
    return Model(tmp_path / "hf")


@pytest.fixture
def small_shards(monkeypatch):
    """Make shards hold two of the model's matrices."""
    monkeypatch.setattr("mlc_llm.weights.shards.SHARD_LIMIT_BYTES", 5000)


def check_complete(model, output):
    """Compare everything in the output with the checkpoint; no trace of work may be left."""
    index = read_tensor_index(output)
    index.verify_checksums()
    index.check([spec for item in model.plan for spec in item.outputs], str(output))
    fused = np.concatenate([model.tensors["m0.weight"], model.tensors["m1.weight"]])
    words, scales = quantize_group(fused, SCHEME, transpose=False)
    np.testing.assert_array_equal(index.read("fused.q_weight"), words)
    np.testing.assert_array_equal(index.read("fused.q_scale"), scales)
    for item in model.plan[1:]:
        expected = model.tensors[item.name].astype(numpy_dtype(item.outputs[0].dtype))
        np.testing.assert_array_equal(index.read(item.name), expected)
    listed = {shard["dataPath"] for shard in read_json(output / "tensor-cache.json")["records"]}
    assert {path.name for path in output.iterdir()} == listed | {"tensor-cache.json"}


def read_json(path):
    return json.loads(path.read_text())


def test_whole_conversion(model, tmp_path):
    seen = []
    summary = convert(model.plan, model.source(), tmp_path / "out", lambda *a: seen.append(a))
    check_complete(model, tmp_path / "out")
    assert seen[0] == (0, 9, "")
    assert seen[-1] == (9, 9, "m9.weight")
    assert [done for done, _, _ in seen] == list(range(10))
    assert summary.num_tensors == 10
    assert summary.num_parameters == 10 * 512
    size = 16 * 32 + 16 * 4 + 6 * 2048 + 2 * 1024
    assert summary.size_bytes == size
    assert summary.bits_per_parameter == size * 8 / 5120
    words, scales = (read_tensor_index(tmp_path / "out").read(f"fused.q_{p}") for p in PARTS)
    weight = dequantize_group(words, scales, SCHEME, 64, transposed=False)
    fused = np.concatenate([model.tensors["m0.weight"], model.tensors["m1.weight"]])
    assert np.abs(weight - fused).max() < 0.3


PARTS = ("weight", "scale")


def test_index_fields(model, tmp_path, small_shards):
    summary = convert(model.plan, model.source(), tmp_path / "out", quiet)
    index = read_json(tmp_path / "out" / "tensor-cache.json")
    assert index["metadata"] == {
        "ParamSize": 10,
        "ParamBytes": summary.size_bytes,
        "BitsPerParam": summary.bits_per_parameter,
    }
    assert len(index["records"]) == 4
    for number, shard in enumerate(index["records"]):
        data = (tmp_path / "out" / f"params_shard_{number}.bin").read_bytes()
        assert shard["dataPath"] == f"params_shard_{number}.bin"
        assert shard["format"] == "raw-shard"
        assert shard["nbytes"] == len(data) < 5000
        assert shard["md5sum"] == hashlib.md5(data).hexdigest()
    record = index["records"][0]["records"][1]
    assert record == {
        "name": "fused.q_scale",
        "shape": [16, 2],
        "dtype": "float16",
        "format": "raw",
        "nbytes": 64,
        "byteOffset": 512,
    }


def test_float32_keeps_every_bit(model, tmp_path):
    convert(model.plan, model.source(), tmp_path / "out", quiet)
    record = read_tensor_index(tmp_path / "out").records["m2.weight"]
    assert not record.is_f32_as_bf16
    assert record.size_bytes == 8 * 64 * 4


def specs_of(*sizes):
    return [TensorSpec(f"t{n}", (size,), "uint8") for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ((10, 20, 30), [[0, 1, 2]]),
        ((60, 39, 1), [[0, 1], [2]]),
        ((10, 90, 20), [[1], [0, 2]]),  # a large one goes out at once, what was begun goes on
        ((60, 45, 10), [[0], [1, 2]]),
        ((250, 10), [[0], [1]]),
        ((10, 250), [[1], [0]]),
        ((), []),
    ],
)
def test_shard_rule(sizes, shards):
    found = lay_out(specs_of(*sizes), 100)
    assert [[int(spec.name[1:]) for spec in shard] for shard in found] == shards


def test_shard_limit_of_mlc():
    assert SHARD_LIMIT_BYTES == 33554432


def test_missing_and_surplus_tensors(model, tmp_path):
    del model.tensors["m3.weight"]
    model.tensors["extra.weight"] = np.zeros(3, np.float32)
    model.save()
    with pytest.raises(ParameterMismatch, match=r"missing m3\.weight; surplus extra\.weight;"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_long_lists_are_cut(model, tmp_path):
    model.tensors |= {f"x{n}": np.zeros(1, np.float32) for n in range(9)}
    model.save()
    with pytest.raises(ParameterMismatch, match="surplus x0, x1, x2, x3, x4 and 4 more"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def test_known_buffers_are_left_out(model, tmp_path):
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "lm_head.weight",
    ):
        model.tensors[name] = np.zeros(3, np.float32)
    model.config["tie_word_embeddings"] = True
    model.save()
    convert(model.plan, model.source(), tmp_path / "tied", quiet)
    check_complete(model, tmp_path / "tied")
    model.config["tie_word_embeddings"] = False
    model.save()
    with pytest.raises(ParameterMismatch, match=r"surplus lm_head\.weight;"):
        convert(model.plan, model.source(), tmp_path / "untied", quiet)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("m0.weight", (9, 64)), ("m1.weight", (8, 63)), ("m5.weight", (64, 8)), ("m9.weight", ())],
)
def test_wrong_shapes_are_found_before_anything_is_written(model, tmp_path, name, shape):
    model.tensors[name] = np.zeros(shape, np.float32)
    model.save()
    with pytest.raises(ParameterMismatch, match=r"must have shape \[.*the checkpoint has \["):
        convert(model.plan, model.source(), tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_other_ways_to_combine_are_checked_when_read(model, tmp_path):
    item = model.plan[1]
    rule = ParamRule(item.rule.sources, lambda parts: parts[0].T)
    model.plan[1] = ParamPlan(item.name, item.shape, rule, item.outputs, item.store)
    with pytest.raises(ParameterMismatch, match=r"m2\.weight must have shape \[8, 64\].*\[64, 8\]"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)
    with pytest.raises(ModelNotFound):
        read_tensor_index(tmp_path / "out")


def test_a_plan_that_contradicts_itself(model, tmp_path):
    item = plain("m2.weight", (8, 64), "float16")
    model.plan[1] = ParamPlan(item.name, item.shape, item.rule, model.plan[1].outputs, item.store)
    with pytest.raises(ParameterMismatch, match=r"float32 was planned, but \[8, 64\] float16"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def test_bad_values_name_the_parameter(model, tmp_path):
    model.tensors["m1.weight"][0, 0] = np.nan
    model.save()
    with pytest.raises(CorruptFile, match=r"fused\.weight: the weight holds NaN"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def interrupt_at(count):
    def progress(done, total, name):
        if done == count:
            raise KeyboardInterrupt

    return progress


class CountingSource(HuggingFaceSource):
    """Notes which tensors are read."""

    def __init__(self, directory):
        super().__init__(directory)
        self.seen = []

    def read(self, name):
        self.seen.append(name)
        return super().read(name)


def test_an_interrupted_run_is_continued(model, tmp_path, small_shards):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(model.plan, model.source(), output, interrupt_at(6))
    with pytest.raises(ModelNotFound):
        read_tensor_index(output)
    assert [path.name for path in output.iterdir()] == [WORK_NAME]
    source = CountingSource(model.directory)
    convert(model.plan, source, output, quiet)
    # Two shards were whole; m6 was held in memory only.
    assert source.seen == [f"m{n}.weight" for n in range(6, 10)]
    check_complete(model, output)


def test_finished_shards_are_not_trusted_when_anything_changed(model, tmp_path, small_shards):
    output = tmp_path / "out"

    def interrupt():
        with pytest.raises(KeyboardInterrupt):
            convert(model.plan, model.source(), output, interrupt_at(6))

    def count_again():
        source = CountingSource(model.directory)
        convert(model.plan, source, output, quiet)
        check_complete(model, output)
        return len(source.seen)

    interrupt()
    model.tensors["m2.weight"] += 1  # another checkpoint
    model.save()
    os.utime(model.directory / "model.safetensors", ns=(1, 1))
    assert count_again() == 10

    interrupt()
    model.plan[7] = plain("m8.weight", (8, 64), "bfloat16")  # another plan
    assert count_again() == 10

    interrupt()
    shard = output / WORK_NAME / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")  # a damaged shard
    assert count_again() == 10 - 2

    interrupt()
    (output / WORK_NAME / "journal.json").write_text("{")
    assert count_again() == 10


def test_interrupted_while_publishing(model, tmp_path, small_shards, monkeypatch):
    output = tmp_path / "out"
    replace, moved = os.replace, []

    def stop_at_second(source, target):
        if pathlib.Path(target).parent == output:
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("mlc_llm.weights.shards.os.replace", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        convert(model.plan, model.source(), output, quiet)
    monkeypatch.undo()
    monkeypatch.setattr("mlc_llm.weights.shards.SHARD_LIMIT_BYTES", 5000)
    with pytest.raises(ModelNotFound):
        read_tensor_index(output)
    source = CountingSource(model.directory)
    convert(model.plan, source, output, quiet)
    assert source.seen == []
    check_complete(model, output)


def test_an_older_artifact_stays_whole_until_the_end(model, tmp_path, small_shards):
    output = tmp_path / "out"
    convert(model.plan, model.source(), output, quiet)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "ndarray-cache.json").write_bytes(before["tensor-cache.json"])
    (output / "notes.txt").write_text("mine")
    older = Model(model.directory)
    model.plan = model.plan[:4]
    for name in ("m5.weight", "m6.weight", "m7.weight", "m8.weight", "m9.weight"):
        del model.tensors[name]
    model.save()
    with pytest.raises(KeyboardInterrupt):
        convert(model.plan, model.source(), output, interrupt_at(3))
    read_tensor_index(output).verify_checksums()
    assert len(read_tensor_index(output).records) == len(older.plan) + 1
    convert(model.plan, model.source(), output, quiet)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    check_complete(model, output)


class FullDisk:
    """Stands in for a file; the disk is full after some bytes."""

    def __init__(self, stream, room):
        self._stream, self._room = stream, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stream.close()

    def write(self, piece):
        self._room[0] -= len(piece)
        if self._room[0] < 0:
            self._stream.write(piece[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._stream.write(piece)


def test_full_disk(model, tmp_path, small_shards, monkeypatch):
    output = tmp_path / "out"
    room, open_path = [8000], pathlib.Path.open

    def open_limited(path, mode="r", *rest, **options):
        stream = open_path(path, mode, *rest, **options)
        return FullDisk(stream, room) if path.suffix == ".tmp" and "b" in mode else stream

    monkeypatch.setattr(pathlib.Path, "open", open_limited)
    with pytest.raises(StorageError, match=r"cannot write to .*No space left.*make room"):
        convert(model.plan, model.source(), output, quiet)
    assert not list(output.rglob("*.tmp"))
    with pytest.raises(ModelNotFound):
        read_tensor_index(output)
    monkeypatch.undo()
    monkeypatch.setattr("mlc_llm.weights.shards.SHARD_LIMIT_BYTES", 5000)
    source = CountingSource(model.directory)
    convert(model.plan, source, output, quiet)
    assert 0 < len(source.seen) < 10
    check_complete(model, output)


def test_too_little_room_is_found_before_the_work(model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("mlc_llm.weights.shards.shutil.disk_usage", lambda path: usage)
    source = CountingSource(model.directory)
    with pytest.raises(StorageError, match=r"needs 0 MB more, the disk has 0 MB free"):
        convert(model.plan, source, tmp_path / "out", quiet)
    assert source.seen == []


def test_output_that_is_a_file(model, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(StorageError, match="cannot write to"):
        convert(model.plan, model.source(), tmp_path / "out", quiet)


def test_shard_truncated_after_the_conversion(model, tmp_path):
    convert(model.plan, model.source(), tmp_path / "out", quiet)
    shard = tmp_path / "out" / "params_shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CorruptFile, match=r"params_shard_0\.bin has .* bytes, the index says"):
        read_tensor_index(tmp_path / "out")


def test_bfloat16_reaches_the_file_unchanged(model, tmp_path):
    convert(model.plan, model.source(), tmp_path / "out", quiet)
    found = read_tensor_index(tmp_path / "out").read("m9.weight")
    assert found.dtype == ml_dtypes.bfloat16


_MEMORY_SCRIPT = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_convert import convert, grouped, quiet, HuggingFaceSource
directory = Path(sys.argv[1])
count, rows, columns = 10, 8192, 2048  # 64 MiB each as float32
size = rows * columns * 4
entries = {
    f"m{n}.weight": {
        "dtype": "F32", "shape": [rows, columns], "data_offsets": [n * size, (n + 1) * size]
    }
    for n in range(count)
}
text = json.dumps(entries).encode()
with (directory / "model.safetensors").open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.truncate(8 + len(text) + count * size)  # holes: zeros that take no disk
(directory / "config.json").write_text("{}")
plan = [
    grouped(f"f{n}", (2 * rows, columns), [f"m{2 * n}.weight", f"m{2 * n + 1}.weight"])
    for n in range(count // 2)
]
source = HuggingFaceSource(directory)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(plan, source, directory / "out", quiet)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_two_tensors_and_a_bit(tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", _MEMORY_SCRIPT, str(tmp_path), here]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fused_mib, checkpoint_mib = 128, 640
    assert int(done.stdout) < 2 * fused_mib + 200 < checkpoint_mib
    assert len(read_tensor_index(tmp_path / "out").records) == 10
