"""Records of what was made of what, and the lock of two conversions into one directory."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from recorder import RecordedProgress
from tiny import write_llama

from mlc_llm.artifact import read_tensor_index
from mlc_llm.errors import StorageError
from mlc_llm.prepare.cache import CacheHome, CachePolicy, discard, hold_lock, lock_at_once
from mlc_llm.prepare.origin import Origin, conversion_key, note_user, read_origin, read_users
from mlc_llm.prepare.resolve import convert_weights, prepare_artifact


@pytest.fixture
def raw_model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny-llama")


def test_a_converted_copy_names_its_source(
    raw_model: Path, home: CacheHome, progress: RecordedProgress
) -> None:
    artifact = prepare_artifact(
        str(raw_model),
        quantization="q0f16",
        home=home,
        download_policy=CachePolicy.ON,
        jit_policy=CachePolicy.ON,
        progress=progress,
    )
    origin = read_origin(artifact)
    assert origin == Origin.of(raw_model, "q0f16")
    assert origin.is_current()
    os.utime(raw_model / "model.safetensors", (1, 1))
    assert not origin.is_current()


def test_the_key_follows_files_that_matter(raw_model: Path) -> None:
    key = conversion_key(raw_model, "q0f16")
    (raw_model / ".download.json").write_text("{}")
    (raw_model / "notes.md").write_text("mine")
    assert conversion_key(raw_model, "q0f16") == key
    assert conversion_key(raw_model, "q0f32") != key
    (raw_model / "generation_config.json").write_text("{}")
    assert conversion_key(raw_model, "q0f16") != key


def test_a_source_that_is_gone_is_not_current(raw_model: Path) -> None:
    origin = Origin.of(raw_model / "config.json", "q0f16")
    assert origin.is_current()
    (raw_model / "config.json").unlink()
    assert not origin.is_current()


@pytest.mark.parametrize("content", ["", "[]", '{"source": "x"}', "\udcff"])
def test_damaged_records_count_as_none(tmp_path: Path, content: str) -> None:
    raw = content.encode(errors="surrogateescape")
    (tmp_path / ".origin.json").write_bytes(raw)
    (tmp_path / "users.json").write_bytes(raw)
    assert read_origin(tmp_path) is None
    assert read_users(tmp_path) == {}


def test_users_are_noted_with_their_last_use(tmp_path: Path) -> None:
    before = time.time()
    for name in ("a", "b", "a"):
        note_user(tmp_path, tmp_path / name)
    users = read_users(tmp_path)
    assert set(users) == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert before <= users[str(tmp_path / "b")] <= users[str(tmp_path / "a")] <= time.time()
    note_user(tmp_path / "missing", tmp_path)  # a cache that cannot be written


def test_two_conversions_into_one_directory_take_turns(raw_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    waits = threading.Event()

    class Told(RecordedProgress):
        def message(self, text: str) -> None:
            super().message(text)
            waits.set()

    progress = Told()

    def convert() -> None:
        convert_weights(raw_model, output, quantization="q0f16", progress=progress)

    with FileLock(output / ".convert.lock"):
        thread = threading.Thread(target=convert)
        thread.start()
        assert waits.wait(60)
        assert not (output / "tensor-cache.json").exists()
    thread.join(60)
    assert f"waiting for another process that is preparing {output}" in progress.messages
    assert read_tensor_index(output).records
    assert not (output / ".convert.lock").exists()


def test_a_lock_that_is_held_is_refused_at_once(home: CacheHome) -> None:
    target = home.root / "thing"
    with hold_lock(target, RecordedProgress()):
        with pytest.raises(StorageError, match=r"thing is being prepared by another process"):
            with lock_at_once(target):
                pass
    with lock_at_once(target):
        pass


def test_discarding_leaves_nothing_and_follows_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    inside = tmp_path / "cache" / "model"
    inside.mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    (inside.parent / "other").symlink_to(outside)
    for path in (inside, inside.parent / "other", inside.parent / "missing"):
        discard(path)
    assert list(inside.parent.iterdir()) == []
    assert (outside / "file").read_text() == "kept"


def test_the_manifest_of_an_older_library_is_not_current(tmp_path: Path) -> None:
    from mlc_llm.prepare.jit import is_current

    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    assert not is_current(tmp_path)
