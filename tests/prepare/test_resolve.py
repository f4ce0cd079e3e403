"""From what a user types to an artifact; conversion itself is replaced by a tiny fake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hub import LocalHub
from recorder import RecordedProgress
from tiny import write_artifact

from mlc_llm.errors import (
    CorruptFile,
    DownloadError,
    ModelNotFound,
    OptionError,
    StorageError,
)
from mlc_llm.prepare import resolve
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.demo import DEMO_FILE
from mlc_llm.prepare.download import HubAccess
from mlc_llm.prepare.progress import NullProgress


class FakeConversion:
    """Writes a tiny artifact where a real conversion would write a large one."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, str]] = []
        self.error: BaseException | None = None

    def __call__(
        self,
        source: Path,
        output: Path,
        quantization: str,
        adapter: Path | None,
        progress: object,
    ) -> None:
        self.calls.append((source, quantization))
        if self.error is not None:
            (output / "mlc-chat-config.json").write_text("{}")
            raise self.error
        write_artifact(output, quantization=quantization)


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    fake = FakeConversion()
    monkeypatch.setattr(resolve, "_convert_model", fake)
    # GGUF files of these tests have no headers; that of the demo model stands for quantized ones.
    monkeypatch.setattr(resolve, "has_codes", lambda source: source.name == DEMO_FILE)
    monkeypatch.setattr(resolve, "is_encoder", lambda source: False)
    return fake


@pytest.fixture
def raw_model(tmp_path: Path) -> Path:
    directory = tmp_path / "Some-1.5B"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def prepare(model: str | Path | None, home: CacheHome, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "quantization": None,
        "home": home,
        "download_policy": CachePolicy.ON,
        "jit_policy": CachePolicy.ON,
        "progress": NullProgress(),
    }
    name = str(model) if isinstance(model, Path) else model
    return resolve.prepare_artifact(name, **{**settings, **changes})


def test_artifact_is_used_as_it_is(home: CacheHome, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    assert prepare(artifact, home) == artifact
    assert prepare(artifact / "mlc-chat-config.json", home) == artifact
    assert prepare(artifact, home, quantization="q4f16_1") == artifact
    assert not home.root.exists()


def test_artifact_in_another_quantization(home: CacheHome, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    with pytest.raises(OptionError, match="already converted with q4f16_1, q0f32 cannot"):
        prepare(artifact, home, quantization="q0f32")


def test_artifact_without_weights(home: CacheHome, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    (artifact / "tensor-cache.json").unlink()
    with pytest.raises(ModelNotFound, match="run `mlc_llm convert_weight` first"):
        prepare(artifact, home)


def test_artifact_with_a_truncated_shard(home: CacheHome, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    (artifact / "params_shard_0.bin").write_bytes(b"")
    with pytest.raises(CorruptFile, match=r"params_shard_0\.bin has 0 bytes"):
        prepare(artifact, home)


def test_unknown_quantization_is_refused_first(home: CacheHome) -> None:
    with pytest.raises(OptionError, match="q9f9"):
        prepare("HF://user/model", home, quantization="q9f9")


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("user/model", "write HF://user/model"),
        ("./user/model", "check the path"),
        ("nothing-here", "check the path"),
        ("", "does not exist"),
        ("x" * 5000, "does not exist|cannot be a path"),
        ("a\0b", "does not exist|cannot be a path"),
    ],
)
def test_model_that_does_not_exist(home: CacheHome, model: str, hint: str) -> None:
    with pytest.raises(ModelNotFound, match=hint):
        prepare(model, home)


def test_empty_directory(home: CacheHome, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is empty"):
        prepare(tmp_path, home)


def test_directory_that_is_no_model(home: CacheHome, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ModelNotFound, match=r"is not a model: .* it holds photo\.jpg"):
        prepare(tmp_path, home)


def test_file_that_is_no_model(home: CacheHome, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ModelNotFound, match=r"photo\.jpg is not a model; give a directory"):
        prepare(tmp_path / "photo.jpg", home)


def test_directory_with_several_gguf_files(home: CacheHome, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(OptionError, match=r"several models; name one of: a\.gguf, b\.gguf"):
        prepare(tmp_path, home)


def test_raw_directory_is_converted_once(
    home: CacheHome, raw_model: Path, conversion: FakeConversion
) -> None:
    artifact = prepare(raw_model, home)
    assert artifact.parent == home.local_directory
    assert artifact.name.startswith("Some-1.5B-q4f16_1-")
    assert prepare(raw_model, home) == artifact
    assert prepare(raw_model / "config.json", home) == artifact
    assert prepare(raw_model, home, jit_policy=CachePolicy.READONLY) == artifact
    assert conversion.calls == [(raw_model, "q4f16_1")]


def test_each_quantization_has_its_own_artifact(
    home: CacheHome, raw_model: Path, conversion: FakeConversion
) -> None:
    first, second = (prepare(raw_model, home, quantization=q) for q in ("q0f32", "q4f16_1"))
    assert first != second
    assert [quantization for _, quantization in conversion.calls] == ["q0f32", "q4f16_1"]


def test_changed_source_is_converted_again(
    home: CacheHome, raw_model: Path, conversion: FakeConversion
) -> None:
    first = prepare(raw_model, home)
    os.utime(raw_model / "model.safetensors", (1, 1))
    assert prepare(raw_model, home) != first
    (raw_model / "notes.md").touch()
    prepare(raw_model, home)
    assert len(conversion.calls) == 2


def test_gguf_file_and_its_directory_are_the_same_model(
    home: CacheHome, tmp_path: Path, conversion: FakeConversion
) -> None:
    source = tmp_path / "dir" / "model.Q4.gguf"
    source.parent.mkdir()
    source.write_bytes(b"GGUF")
    (source.parent / "config.json").write_text("{}")
    assert prepare(source, home) == prepare(source.parent, home)
    assert conversion.calls == [(source, "q4f16_1")]


def test_broken_conversion_is_not_taken_as_whole(
    home: CacheHome, raw_model: Path, conversion: FakeConversion
) -> None:
    conversion.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        prepare(raw_model, home)
    (left,) = [path for path in home.local_directory.iterdir() if path.is_dir()]
    assert left.name.endswith(".partial")
    conversion.error = None
    artifact = prepare(raw_model, home)
    assert artifact.name == left.name.removesuffix(".partial")
    assert not left.exists()


def test_damaged_artifact_in_the_cache_is_made_again(
    home: CacheHome, raw_model: Path, conversion: FakeConversion
) -> None:
    artifact = prepare(raw_model, home)
    (artifact / "params_shard_0.bin").unlink()
    assert prepare(raw_model, home) == artifact
    assert (artifact / "params_shard_0.bin").exists()
    assert len(conversion.calls) == 2


def test_policies_of_conversion(
    home: CacheHome, raw_model: Path, conversion: FakeConversion
) -> None:
    with pytest.raises(StorageError, match=r"READONLY forbids .* MLC_JIT_POLICY=ON"):
        prepare(raw_model, home, jit_policy=CachePolicy.READONLY)
    apart = prepare(raw_model, home, jit_policy=CachePolicy.OFF)
    assert (apart / "params_shard_0.bin").exists()
    assert not home.root.exists()
    kept = prepare(raw_model, home)
    assert prepare(raw_model, home, jit_policy=CachePolicy.REDO) == kept
    assert len(conversion.calls) == 3


def test_home_that_cannot_be_written(
    raw_model: Path, tmp_path: Path, conversion: FakeConversion
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="MLC_LLM_HOME"):
        prepare(raw_model, CacheHome(tmp_path / "file"))
    assert conversion.calls == []


def test_no_model_means_the_demo_model(home: CacheHome, conversion: FakeConversion) -> None:
    home.demo_directory.mkdir(parents=True)
    demo = home.demo_directory / DEMO_FILE
    demo.write_bytes(b"GGUF")
    assert prepare(None, home).name.startswith("SmolLM2-135M-Instruct.Q4_1-gguf-")
    prepare(None, home, quantization="q0f32")
    assert conversion.calls == [(demo, "gguf"), (demo, "q0f32")]


def test_headers_are_not_read_again_for_what_is_converted(
    home: CacheHome, tmp_path: Path, conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / DEMO_FILE
    source.write_bytes(b"GGUF")
    first = prepare(source, home)
    monkeypatch.delattr(resolve, "has_codes")
    assert prepare(source, home) == first
    assert conversion.calls == [(source, "gguf")]


def test_demo_model_comes_from_the_hub_where_its_file_is_missing(
    home: CacheHome, hub: LocalHub, conversion: FakeConversion
) -> None:
    access = HubAccess(hub.endpoint)
    hub.add(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"config.json": b"{}", "model.safetensors": b"weights"},
    )
    assert prepare(None, home, access=access).is_dir()
    assert conversion.calls[0][1] == "q8f16_1"
    hub.stop()
    prepare(None, home, access=access)
    with pytest.raises(DownloadError, match="mlc_llm demo-model"):
        prepare(None, CacheHome(home.root / "other"), access=access)


def test_raw_repository_is_fetched_and_converted(
    home: CacheHome, hub: LocalHub, progress: RecordedProgress, conversion: FakeConversion
) -> None:
    hub.add("user/raw", {"config.json": b"{}", "model.safetensors": b"weights"})
    settings = {"access": HubAccess(hub.endpoint), "progress": progress}
    artifact = prepare("HF://user/raw", home, **settings)
    assert artifact.name.startswith("raw-q4f16_1-")
    hub.stop()
    assert prepare("HF://user/raw", home, **settings) == artifact
    assert [stage.name for stage in progress.stages] == ["Downloading HF://user/raw"]


def test_converted_repository_is_used_as_it_is(
    home: CacheHome, hub: LocalHub, tmp_path: Path, conversion: FakeConversion
) -> None:
    files = {p.name: p.read_bytes() for p in write_artifact(tmp_path / "artifact").iterdir()}
    hub.add("user/converted", files)
    access = HubAccess(hub.endpoint)
    artifact = prepare("HF://user/converted", home, access=access)
    assert artifact == home.hub_directory / "user" / "converted"
    with pytest.raises(OptionError, match="already converted"):
        prepare("HF://user/converted", home, access=access, quantization="q0f32")
    assert conversion.calls == []
