"""Packed parameters: made once beside a JIT library, then mapped; never trusted blindly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch
from mlc_llm.runtime import parameters
from mlc_llm.runtime.library import Library, load_library
from mlc_llm.runtime.parameters import load_parameters

pytestmark = pytest.mark.cpu


class Place:
    """Private copies of an artifact and its library, and what loading reports."""

    def __init__(self, artifact: Path, library: Path, root: Path) -> None:
        self.artifact, self.directory = root / "artifact", root / "library"
        shutil.copytree(artifact, self.artifact)
        shutil.copytree(library, self.directory, ignore=shutil.ignore_patterns("packed-*"))
        self.library: Library = load_library(self.directory)
        self.reports: list[str] = []

    def load(self) -> list[NDArray[Any]]:
        return load_parameters(self.artifact, self.library, self.reports.append)

    @property
    def cache_files(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if "packed" in path.name]

    @property
    def num_packings(self) -> int:
        return len(self.reports)


@pytest.fixture
def place(tiny_models, tmp_path) -> Place:
    name, quantization = "llama_odd_sizes", "q4bf16_1"
    artifact = tiny_models.artifact(name, quantization)
    return Place(artifact, tiny_models.library(name, quantization), tmp_path)


def assert_same(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


def test_second_load_maps_the_file(place, monkeypatch) -> None:
    first = [array.copy() for array in place.load()]
    [cache] = place.cache_files
    assert place.reports == ["pack weights for this CPU"]
    monkeypatch.setattr(parameters, "pack_parameters", None)
    second = place.load()
    assert place.num_packings == 1
    assert_same(second, first)
    for array in second:
        assert array.ctypes.data % 64 == 0
    # Mapped privately: writing into memory leaves the file alone.
    content = cache.read_bytes()
    second[-1].view(np.uint8)[...] ^= 255
    assert cache.read_bytes() == content


def damage_header(path: Path) -> None:
    path.write_bytes(b"garbage" + path.read_bytes()[7:])


def damage_length(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def damage_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9', 1))


def damage_arrays(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"arrays"', b'"brrays"', 1))


def damage_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"uint32"', b'"uint33"', 1))


def damage_offset(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b", 1048576]", b", 9948576]", 1))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [
    damage_header,
    damage_length,
    damage_format,
    damage_arrays,
    damage_dtype,
    damage_offset,
    empty,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_made_again(place, damage) -> None:
    first = [array.copy() for array in place.load()]
    [cache] = place.cache_files
    whole = cache.read_bytes()
    damage(cache)
    assert cache.read_bytes() != whole
    assert_same(place.load(), first)
    assert place.num_packings == 2
    assert cache.read_bytes() == whole


def test_file_of_other_weights_is_replaced(place) -> None:
    first = [array.copy() for array in place.load()]
    [stale] = place.cache_files
    [shard] = place.artifact.glob("params_shard_*.bin")
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(1, 1))
    # Neither the old file nor damaged weights are taken.
    with pytest.raises(CorruptFile, match="is damaged"):
        place.load()
    index = place.artifact / "tensor-cache.json"
    data = json.loads(index.read_text())
    data["records"][0]["md5sum"] = hashlib.md5(content).hexdigest()
    index.write_text(json.dumps(data))
    second = place.load()
    assert place.cache_files != [stale] and len(place.cache_files) == 1
    assert any(
        (one.view(np.uint8) != other.view(np.uint8)).any()
        for one, other in zip(first, second, strict=True)
    )


def test_interrupted_writing_leaves_no_file(place, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parameters.os, "replace", full)
    first = place.load()
    assert place.cache_files == []
    monkeypatch.undo()
    assert_same(place.load(), first)
    assert place.num_packings == 2 and len(place.cache_files) == 1


def test_directory_that_cannot_be_written(place, monkeypatch) -> None:
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *args, **kwargs)

    # Mode bits do not stop root, under whom tests may run.
    monkeypatch.setattr(Path, "open", read_only)
    first = place.load()
    assert place.cache_files == [] and len(first) > 10
    assert_same(place.load(), first)
    assert place.num_packings == 2


def test_weights_that_do_not_fit(place, tiny_models) -> None:
    other = tiny_models.artifact("llama_odd_sizes", "q0f32")
    with pytest.raises(ParameterMismatch, match="do not fit the model: missing"):
        load_parameters(other, place.library, place.reports.append)
    assert place.cache_files == []


def test_artifact_without_weights(place, tmp_path) -> None:
    with pytest.raises(ModelNotFound, match="has no weights; run `mlc_llm convert_weight`"):
        load_parameters(tmp_path, place.library, place.reports.append)


def test_models_that_share_a_library_keep_their_files(place) -> None:
    place.load()
    other = place.artifact.with_name("other")
    shutil.copytree(place.artifact, other)
    index = other / "tensor-cache.json"
    index.write_text(index.read_text() + " ")
    load_parameters(other, place.library, place.reports.append)
    owners = {parameters.packed_artifact(path) for path in place.cache_files}
    assert owners == {str(place.artifact.resolve()), str(other.resolve())}
    place.load()
    assert place.num_packings == 2
    # The file of a model that is gone goes when the next one is written.
    shutil.rmtree(other)
    index = place.artifact / "tensor-cache.json"
    index.write_text(index.read_text() + "\n")
    place.load()
    assert [parameters.packed_artifact(path) for path in place.cache_files] == [
        str(place.artifact.resolve())
    ]
