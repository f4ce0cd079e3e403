"""`package`: what an app gets, what is not made twice, and which mistakes are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hub import LocalHub
from manage import Run, files_of
from tiny import write_artifact, write_llama

from mlc_llm.artifact import read_chat_config, read_tensor_index
from mlc_llm.compiler import archives


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where tests write their configuration; the output is beside it."""
    return tmp_path / "app" / "mlc-package-config.json"


def package(run: Run, config: Path, content: Any) -> Any:
    config.parent.mkdir(exist_ok=True)
    config.write_text(content if isinstance(content, str) else json.dumps(content))
    output = str(config.parent / "dist")
    return run("package", "--package-config", str(config), "--output", output)


def times_of(directory: Path) -> dict[str, int]:
    """Return when each file was written, locks aside."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): path.stat().st_mtime_ns
        for path in files
        if path.name != "mlc-app-config.json" and path.suffix not in (".lock", ".a")
    }


@pytest.mark.cpu
def test_an_app_for_phones(run: Run, config: Path, llama: Path) -> None:
    write_llama(llama.parent / "other", seed=1)
    entries = [
        {"model": f"../models/{llama.name}", "model_id": "one", "overrides": {}},
        {"model": "../models/other", "model_id": "two", "model_lib": "second"},
    ]
    entries[0]["overrides"] = {"context_window_size": 64, "prefill_chunk_size": 32}
    for entry in entries:
        entry |= {"bundle_weight": True, "quantization": "q4f16_1"}
    wanted = {"device": "android", "model_list": entries}
    done = package(run, config, wanted)
    assert done.code == 0, done.err
    dist = config.parent / "dist"
    assert done.out.strip() == str(dist / "bundle" / "mlc-app-config.json")
    first, second = json.loads(Path(done.out.strip()).read_text())["model_list"]
    assert (first["model_id"], first["model_path"]) == ("one", "one")
    assert (second["model_id"], second["model_lib"]) == ("two", "second")
    # The other model's keys and values are for twice as many tokens.
    assert 0 < first["estimated_vram_bytes"] < second["estimated_vram_bytes"]
    assert read_chat_config(dist / "bundle" / "one").context_window_size == 64
    assert read_chat_config(dist / "bundle" / "two").context_window_size == 128
    read_tensor_index(dist / "bundle" / "two").verify_checksums()
    assert (dist / "bundle" / "one" / "tokenizer.json").is_file()
    for record in (first, second):
        with tarfile.open(dist / "lib" / f"{record['model_lib']}.tar") as archive:
            prefix = record["model_lib"].replace("-", "_") + "_"
            assert archive.getnames() and all(n.startswith(prefix) for n in archive.getnames())
            code = archive.extractfile(f"{prefix}lib0.o").read()
            assert code[:4] == b"\x7fELF" and f"__tvm_ffi_{prefix}".encode() in code

    before = times_of(dist)
    again = package(run, config, wanted)
    assert again.code == 0 and again.err.count("is there already") == 2
    assert "Compiling" not in again.err and times_of(dist) == before
    # What was cut off is made good: a file that is missing, and one that is not whole.
    (shard,) = (dist / "bundle" / "two").glob("params_shard_*.bin")
    shard.unlink()
    broken = dist / "lib" / "second.tar"
    broken.write_bytes(broken.read_bytes()[:1000])
    repaired = package(run, config, wanted)
    assert repaired.code == 0 and repaired.err.count("is there already") == 1
    read_tensor_index(dist / "bundle" / "two").verify_checksums()
    assert tarfile.is_tarfile(broken) and broken.stat().st_size > 1000


def write_tars(directory: Path) -> list[Path]:
    """Write two `.tar` libraries whose members have the same name."""
    tars = []
    for text in ("one", "two"):
        source = directory / "lib0.o"
        source.write_text(text)
        tars.append(directory / f"{text}.tar")
        with tarfile.open(tars[-1], "w") as archive:
            archive.add(source, arcname="lib0.o")
    return tars


def test_one_archive_of_all_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libmodel_android.a"
    seen = []

    def archive(command: list[str], **_: Any) -> Any:
        seen.append([Path(name).read_text() for name in command if name.endswith(".o")])
        Path(command[command.index("rcs") + 1]).write_bytes(b"!<arch>\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(shutil, "which", lambda name: name if name == "llvm-ar" else None)
    monkeypatch.setattr(subprocess, "run", archive)
    archives.write_static_archive(write_tars(tmp_path), path, "android")
    assert seen == [["one", "two"]]
    assert path.read_bytes() == b"!<arch>\n"
    assert not list(tmp_path.glob(".*"))


def test_without_an_archiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_find_archiver", lambda device: None)
    with pytest.raises(archives.LinkerNotFound, match=r"libmodel_iphone.a is not made.*one.tar"):
        archives.write_static_archive([Path("one.tar")], tmp_path / "libmodel_iphone.a", "iphone")


def test_a_page(run: Run, config: Path, tmp_path: Path) -> None:
    """The library is given, so nothing is compiled."""
    write_artifact(tmp_path / "models" / "tiny", quantization="q4f16_1")
    (tmp_path / "models" / "ready.wasm").write_bytes(b"\0asm")
    entry = {"model": "../models/tiny", "model_id": "tiny", "bundle_weight": True}
    entry |= {"model_lib": "ready", "estimated_vram_bytes": 3 << 20}
    wanted: dict[str, Any] = {"device": "webgpu", "model_list": [entry]}
    wanted["model_lib_path_for_prepare_libs"] = {"ready": "../models/ready.wasm"}
    done = package(run, config, wanted)
    assert done.code == 0, done.err
    bundle = config.parent / "dist" / "bundle"
    (record,) = json.loads((bundle / "mlc-app-config.json").read_text())["model_list"]
    assert record == {
        "model_id": "tiny",
        "model": "tiny/",
        "model_lib": "lib/ready.wasm",
        "vram_required_MB": 3,
        "required_features": ["shader-f16"],
    }
    assert (bundle / "lib" / "ready.wasm").read_bytes() == b"\0asm"
    # web-llm looks for files where the hub has them.
    copied = bundle / "tiny" / "resolve" / "main"
    assert files_of(copied).keys() >= {"mlc-chat-config.json", "tensor-cache.json"}
    del entry["estimated_vram_bytes"]
    refused = package(run, config, wanted)
    assert refused.code == 2 and "'estimated_vram_bytes' is missing" in refused.err


def test_a_repository_stays_where_it_is(
    run: Run, config: Path, hub: LocalHub, tmp_path: Path
) -> None:
    artifact = write_artifact(tmp_path / "models" / "tiny", quantization="q4f32_1")
    hub.add("user/tiny", files_of(artifact))
    (tmp_path / "ready.wasm").write_bytes(b"\0asm")
    entry = {"model": "HF://user/tiny", "model_id": "tiny", "model_lib": "ready"}
    entry |= {"estimated_vram_bytes": 1, "overrides": {"context_window_size": 32}}
    wanted: dict[str, Any] = {"device": "webgpu", "model_list": [entry]}
    wanted["model_lib_path_for_prepare_libs"] = {"ready": "../ready.wasm"}
    done = package(run, config, wanted)
    assert done.code == 0, done.err
    (record,) = json.loads(Path(done.out.strip()).read_text())["model_list"]
    assert record["model"] == "https://huggingface.co/user/tiny"
    assert record["overrides"] == {"context_window_size": 32}
    assert not (config.parent / "dist" / "bundle" / "tiny").exists()
    assert not hub.downloads("params_shard_0.bin")


def test_a_repository_that_is_not_converted(
    run: Run, config: Path, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"model": published, "model_id": "tiny"}
    refused = package(run, config, {"device": "iphone", "model_list": [entry]})
    assert refused.code == 1 and "set bundle_weight to true" in refused.err


def test_one_name_for_two_libraries(run: Run, config: Path, tmp_path: Path) -> None:
    write_artifact(tmp_path / "models" / "a", quantization="q4f16_1")
    write_artifact(tmp_path / "models" / "b", quantization="q4f32_1")
    entries = [
        {"model": f"../models/{x}", "model_id": x, "bundle_weight": True, "model_lib": "l"}
        for x in "ab"
    ]
    refused = package(run, config, {"device": "android", "model_list": entries})
    assert refused.code == 2
    assert "model_list[1]: model_lib 'l' is that of a too, which needs another" in refused.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object"),
        ({"device": None}, "'device' is missing"),
        ({"device": "windows"}, "device is 'windows'; known: webgpu, android, iphone"),
        ({"device": "macabi"}, "For Mac Catalyst no code is made"),
        ({"models": []}, "unknown key 'models'; known: device, model_list"),
        ({"model_list": []}, "model_list is empty"),
        ({"model_list": {}}, "model_list must be a list, it is {}"),
        ({"model_list": ["x"]}, "model_list[0] must be an object, it is 'x'"),
        ({"model_id": None}, "model_list[0]: 'model_id' is missing"),
        ({"model_id": "../x"}, "model_list[0]: model_id: '../x' becomes the name of a file"),
        ({"model_lib": "a/b"}, "model_list[0]: model_lib: 'a/b' becomes the name"),
        ({"model": 3}, "model_list[0]: model must be text, it is 3"),
        ({"model": "no", "bundle_weight": True}, "/no' does not exist"),
        ({"model": "x.gguf", "bundle_weight": True}, "'quantization' is missing"),
        ({"model": "here"}, "bundle_weight must be true for"),
        ({"bundle_weight": "yes"}, "bundle_weight must be true or false, it is 'yes'"),
        ({"estimated_vram_bytes": 0}, "estimated_vram_bytes must be a whole number above 0"),
        ({"estimated_vram_bytes": True}, "estimated_vram_bytes must be a whole number above 0"),
        ({"overrides": {"top_p": 1}}, "overrides: unknown key 'top_p'; known: context_window"),
        ({"overrides": {"prefill_chunk_size": "a"}}, "prefill_chunk_size must be a whole number"),
        ({"overrides": {"tensor_parallel_shards": 2}}, "tensor_parallel_shards must be 1"),
        ({"bundle": True}, "model_list[0]: unknown key 'bundle'"),
        ({"model": "HF://user/tiny@v1"}, "names a revision, but apps load the main one"),
        ({"model": "HF://user"}, "does not name a repository"),
        ({"model_lib_path_for_prepare_libs": {"x": "x.tar"}}, "must name a .tar file that is"),
        ({"model_lib_path_for_prepare_libs": {"x": 1}}, "['x'] must be the path of a library"),
    ],
)
def test_mistakes_are_named(run: Run, config: Path, changes: Any, message: str) -> None:
    content = changes
    if isinstance(changes, dict):
        content = {"device": "android"}
        entry = {"model": "HF://user/tiny", "model_id": "tiny"}
        of_all = ("device", "models", "model_list", "model_lib_path_for_prepare_libs")
        for key, value in changes.items():
            (content if key in of_all else entry)[key] = value
        content.setdefault("model_list", [entry])
    refused = package(run, config, content)
    assert refused.code in (1, 2)
    assert refused.err.splitlines()[-1].startswith("error: ") and message in refused.err
    assert "Traceback" not in refused.err and not list(config.parent.rglob("*.json"))[1:]


def test_two_of_one_name(run: Run, config: Path) -> None:
    entries = [{"model": "HF://user/tiny", "model_id": name} for name in ("tiny", "Tiny")]
    refused = package(run, config, {"device": "android", "model_list": entries})
    assert refused.code == 2 and "model_id 'Tiny' is that of" in refused.err


def test_options_that_cannot_be_honoured(
    run: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = run("package", "--mlc-llm-source-dir", "mlc-llm")
    assert refused.code == 2 and "no sources are needed; leave it out" in refused.err
    missing = run("package", "--package-config", str(config))
    assert missing.code == 2 and "does not exist; write one" in missing.err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    entry = {"model": "HF://user/tiny", "model_id": "tiny"}
    refused = package(run, config, {"device": "webgpu", "model_list": [entry]})
    assert refused.code == 1 and "apt install emscripten" in refused.err
    # Said before the model is looked for.
    refused = run("compile", "nowhere", "--device", "webgpu", "--output", "model.wasm")
    assert refused.code == 1 and "apt install emscripten" in refused.err
