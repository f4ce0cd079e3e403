"""Conversion that ends early: what is left, what is taken up again, what is never trusted."""

import errno
import os
import pathlib

import pytest
from make_checkpoint import Model, check_complete, plain, quiet

from mlc_llm.artifact import read_tensor_index
from mlc_llm.errors import ModelNotFound, StorageError
from mlc_llm.weights.convert import convert
from mlc_llm.weights.huggingface import HuggingFaceSource
from mlc_llm.weights.shards import WORK_NAME


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


def test_interrupted_when_a_shard_is_first_seen(model, tmp_path, small_shards, monkeypatch):
    output = tmp_path / "out"
    shard = output / WORK_NAME / "params_shard_0.bin"
    replace = os.replace

    def stop_after_the_shard(source, target):
        replace(source, target)
        if pathlib.Path(target) == shard:
            raise KeyboardInterrupt

    monkeypatch.setattr("mlc_llm.weights.shards.os.replace", stop_after_the_shard)
    with pytest.raises(KeyboardInterrupt):
        convert(model.plan, model.source(), output, quiet)
    monkeypatch.setattr("mlc_llm.weights.shards.os.replace", replace)
    seen = shard.stat()
    convert(model.plan, model.source(), output, quiet)
    kept = (output / shard.name).stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns)
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
