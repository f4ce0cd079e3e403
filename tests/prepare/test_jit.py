"""The cache of compiled libraries; the compiler is a fake that writes two files."""

from __future__ import annotations

import dataclasses
import errno
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorder import RecordedProgress
from tiny import write_artifact

from mlc_llm.artifact import KVCacheLayout, LibraryMetadata, read_chat_config
from mlc_llm.device import Device
from mlc_llm.errors import CompileError, LibraryError, StorageError, UnsupportedModel
from mlc_llm.prepare import jit
from mlc_llm.prepare.cache import CacheHome, CachePolicy

METADATA = LibraryMetadata(
    model_type="llama",
    quantization="q4f16_1",
    context_window_size=64,
    sliding_window_size=-1,
    attention_sink_size=-1,
    prefill_chunk_size=32,
    max_batch_size=1,
    vocab_size=16,
    params=[],
    kv_cache=KVCacheLayout(1, 1, 8, 16, "float16"),
    memory_usage={},
    target={},
    isa=[],
    compiler_version="0",
)


class FakeCompiler:
    """Stands in for mlc_llm.compiler."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.error: Exception | None = None
        self.refused: str | None = None  # a device

    def describe_any_target(self, device: str, opt: str) -> dict[str, Any]:
        return {"kind": "llvm", "device": device, "opt": opt}

    def compile_model(self, config: object, options: Any, progress: Callable[[str], None]) -> Any:
        self.calls.append(options)
        progress("lower")
        progress("build")
        if self.error and self.refused in (None, options.device):
            raise self.error
        return self

    def save_objects(self, directory: Path) -> None:
        (directory / "lib.o").write_bytes(b"code")
        (directory / "metadata.json").write_text(METADATA.to_json())


@dataclasses.dataclass(frozen=True)
class FakeOptions:
    device: str
    opt: str
    overrides: dict[str, Any]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    target = types.ModuleType("mlc_llm.compiler.target")
    target.describe_any_target = fake.describe_any_target  # type: ignore[attr-defined]
    module = types.ModuleType("mlc_llm.compiler.compile")
    module.compile_model = fake.compile_model  # type: ignore[attr-defined]
    module.CompileOptions = FakeOptions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlc_llm.compiler.target", target)
    monkeypatch.setitem(sys.modules, "mlc_llm.compiler.compile", module)
    return fake


@pytest.fixture
def get(
    home: CacheHome, tmp_path: Path, compiler: FakeCompiler, progress: RecordedProgress
) -> Callable[..., Path]:
    artifact = write_artifact(tmp_path / "artifact")

    def prepare(**changes: Any) -> Path:
        settings: dict[str, Any] = {
            "device": "cpu",
            "opt": "O2",
            "overrides": {},
            "home": home,
            "jit_policy": CachePolicy.ON,
            "progress": progress,
        }
        return jit.prepare_library(artifact, **{**settings, **changes})

    return prepare


def test_library_is_compiled_once(
    get: Callable[..., Path],
    home: CacheHome,
    compiler: FakeCompiler,
    progress: RecordedProgress,
) -> None:
    library = get()
    assert library.parent == home.library_directory
    assert library.name.startswith("llama-q4f16_1-")
    assert (library / "lib.o").read_bytes() == b"code"
    assert get() == library
    assert get(jit_policy=CachePolicy.READONLY) == library
    assert len(compiler.calls) == 1
    (stage,) = progress.stages
    assert (stage.name, stage.done, stage.is_finished) == ("Compiling llama q4f16_1", 2, True)
    assert [path for path in home.library_directory.iterdir() if path.is_dir()] == [library]


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu:0"},
        {"opt": "O0"},
        {"overrides": {"context_window_size": 32}},
        {"overrides": {"kv_cache_dtype": "float32"}},
    ],
)
def test_what_changes_the_code_changes_the_library(
    get: Callable[..., Path], compiler: FakeCompiler, change: dict[str, Any]
) -> None:
    assert get() != get(**change)
    assert len(compiler.calls) == 2
    assert compiler.calls[1].overrides == change.get("overrides", {})


def test_overrides_of_the_engine_do_not_reach_the_compiler(
    get: Callable[..., Path], compiler: FakeCompiler
) -> None:
    assert get() == get(overrides={"max_history_size": 4})
    assert [options.overrides for options in compiler.calls] == [{}]


def test_key_depends_on_model_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**changes: Any) -> str:
        config = read_chat_config(write_artifact(tmp_path, **changes))
        return jit.library_key(config, {"kind": "llvm"}, {})

    keys = [
        key(),
        key(quantization="q0f32"),
        key(model_type="qwen2"),
        key(model_config={"hidden_size": 16}),
        key(context_window_size=32),
    ]
    assert key() == keys[0]
    assert key(temperature=0.1) == keys[0]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    keys.append(key())
    monkeypatch.setattr("mlc_llm.__version__", "9.9")
    keys.append(key())
    monkeypatch.setattr(jit, "_compiler_digest", lambda: "other")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_auto_is_a_gpu_that_can_run_the_model(
    get: Callable[..., Path],
    compiler: FakeCompiler,
    progress: RecordedProgress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jit, "detect_device", lambda: Device("cuda", 0))
    assert get(device="auto") == get(device="cuda:0") != get(device="cpu")
    assert [options.device for options in compiler.calls] == ["cuda:0", "cpu"]
    compiler.error, compiler.refused = UnsupportedModel("its heads are too wide"), "cuda:0"
    settings = {"overrides": {"max_batch_size": 3}}
    library = get(device="auto", **settings)
    assert [options.device for options in compiler.calls[2:]] == ["cuda:0", "cpu"]
    assert progress.messages[-1] == "the CPU is used, not cuda:0: its heads are too wide"
    assert get(device="cpu", **settings) == library
    with pytest.raises(UnsupportedModel):
        get(device="cuda:0", **settings)


def test_policy_off_compiles_apart(
    get: Callable[..., Path], home: CacheHome, compiler: FakeCompiler
) -> None:
    library = get(jit_policy=CachePolicy.OFF)
    assert (library / "lib.o").exists()
    assert not home.root.exists()
    get(jit_policy=CachePolicy.OFF)
    assert len(compiler.calls) == 2


def test_policy_redo_compiles_again(get: Callable[..., Path], compiler: FakeCompiler) -> None:
    library = get()
    (library / "lib.o").write_bytes(b"old!")
    assert get() == library
    assert (library / "lib.o").read_bytes() == b"old!"
    assert get(jit_policy=CachePolicy.REDO) == library
    assert (library / "lib.o").read_bytes() == b"code"
    assert len(compiler.calls) == 2


def test_policy_readonly_wants_a_library(get: Callable[..., Path], compiler: FakeCompiler) -> None:
    with pytest.raises(LibraryError, match=r"READONLY forbids compiling .* MLC_JIT_POLICY=ON"):
        get(jit_policy=CachePolicy.READONLY)
    assert compiler.calls == []


@pytest.mark.parametrize("damage", ["truncated", "removed", "metadata", "manifest", "binary"])
def test_damaged_library_is_compiled_again(
    get: Callable[..., Path], compiler: FakeCompiler, damage: str
) -> None:
    library = get()
    if damage == "truncated":
        (library / "lib.o").write_bytes(b"co")
    elif damage == "removed":
        (library / "lib.o").unlink()
    elif damage == "metadata":
        (library / "metadata.json").write_text("{}")
    elif damage == "manifest":
        (library / "manifest.json").write_text('{"files": {')
    else:
        (library / "metadata.json").write_bytes(b"\xff\xfe")
    assert not jit.is_whole(library)
    assert get() == library
    assert jit.is_whole(library)
    assert len(compiler.calls) == 2


def test_failed_compilation_leaves_nothing(
    get: Callable[..., Path], home: CacheHome, compiler: FakeCompiler
) -> None:
    compiler.error = CompileError("stage lower failed")
    with pytest.raises(CompileError):
        get()
    assert [path for path in home.library_directory.iterdir() if path.is_dir()] == []


def test_disk_that_fills_up_leaves_nothing(
    get: Callable[..., Path],
    home: CacheHome,
    compiler: FakeCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save(directory: Path) -> None:
        (directory / "metadata.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiler, "save_objects", save)
    with pytest.raises(StorageError, match="no space left"):
        get()
    assert [path for path in home.library_directory.iterdir() if path.is_dir()] == []


def test_home_that_cannot_be_written_costs_only_the_cache(
    get: Callable[..., Path], tmp_path: Path, progress: RecordedProgress
) -> None:
    (tmp_path / "file").touch()
    library = get(home=CacheHome(tmp_path / "file"))
    assert jit.is_whole(library)
    assert "will not be kept: cannot write" in progress.messages[0]
