"""What does not work is refused: a message that names it, an exit code, nothing half done.

Single options are in tests/cli; here is what needs files, a compiled library or a second process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import Program
from safetensors.numpy import load_file, save_file

ASK = ("--prompt", "hi", "--max-tokens", "4", "--temperature", "0")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def change(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def change_tensors(directory: Path, **changes: Any) -> None:
    """Add tensors to a checkpoint; None takes one away."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def set_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.update(architectures=["MambaForCausalLM"], model_type="mamba")
    (directory / "config.json").write_text(json.dumps(config))


def remove_all(directory: Path) -> None:
    shutil.rmtree(directory)


def empty(directory: Path) -> None:
    remove_all(directory)
    directory.mkdir()


def only_a_note(directory: Path) -> None:
    empty(directory)
    (directory / "notes.txt").write_text("no model")


NORM = "model.norm.weight"
SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (remove_all, "does not exist"),
    "empty": (empty, "is empty"),
    "not a model": (only_a_note, "is not a model"),
    "unsupported": (set_architecture, "MambaForCausalLM is not supported; supported: "),
    "truncated weights": (lambda d: cut(d / "model.safetensors", 300_000), "is truncated"),
    "corrupt weights": (lambda d: change(d / "model.safetensors", 9, b"\xff" * 99), "safetensors"),
    "truncated tokenizer": (lambda d: cut(d / "tokenizer.json", 3000), "is not a tokenizer"),
    "corrupt tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "broken config": (lambda d: cut(d / "config.json", 40), "config.json is not valid JSON"),
    "missing tensor": (lambda d: change_tensors(d, **{NORM: None}), f"missing {NORM}"),
    "surplus tensor": (lambda d: change_tensors(d, more=np.zeros(4, "f4")), "surplus more"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_broken_source(name: str, program: Program, stories260k: Path, tmp_path: Path) -> None:
    break_it, words = SOURCES[name]
    shutil.copytree(stories260k, tmp_path / "model")
    break_it(tmp_path / "model")
    home = tmp_path / "home"
    environment = {**program.environment, "MLC_LLM_HOME": str(home)}
    program.refuse("chat", tmp_path / "model", *ASK, words=words, env=environment)
    converted = home / "model_weights" / "local"
    assert not [path for path in converted.glob("*/tensor-cache.json")]
    assert not (home / "model_lib").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a GGUF file"),
        (b"no model at all" * 99, "is not a GGUF file"),
        (b"GGUF\3\0\0\0" + b"\7" + bytes(7) + b"\7" + bytes(7), "model.gguf"),
    ],
)
def test_broken_gguf_file(content: bytes, words: str, program: Program, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    program.refuse("chat", tmp_path / "model.gguf", *ASK, words=words)


@pytest.mark.parametrize("model", [("HF://user/repo",), ()], ids=["repository", "demo"])
def test_no_network(model: tuple[str, ...], program: Program, tmp_path: Path) -> None:
    nothing_cached = {**program.environment, "MLC_LLM_HOME": str(tmp_path)}
    words = "check the network connection"
    program.refuse("chat", *model, *ASK, words=words, env=nothing_cached)


# From here on the model is converted and compiled.


@pytest.fixture(scope="session")
def compiled(
    program: Program, stories260k: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An artifact and a library for it."""
    artifact = tmp_path_factory.mktemp("compiled") / "stories"
    for step in ("gen_config", "convert_weight"):
        program.must_run(step, stories260k, "--quantization", "q4f16_1", "-o", artifact)
    library = artifact.parent / "lib.so"
    program.must_run("compile", artifact, "-o", library)
    return artifact, library


@pytest.fixture
def artifact(compiled: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the artifact, to be broken."""
    return Path(shutil.copytree(compiled[0], tmp_path / "artifact"))


@pytest.fixture
def library(compiled: tuple[Path, Path]) -> Path:
    return compiled[1]


def rewrite_index(directory: Path) -> None:
    """Call one tensor by another name: one is missing then, and one too many."""
    index = directory / "tensor-cache.json"
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.room.weight"'))


ARTIFACTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda d: cut(d / "params_shard_0.bin", 150_000), "150,000 bytes"),
    "corrupt shard": (lambda d: change(d / "params_shard_0.bin", 99, b"?"), "is damaged (MD5"),
    "missing shard": (lambda d: (d / "params_shard_0.bin").unlink(), "params_shard_0.bin is mi"),
    "no weights": (lambda d: (d / "tensor-cache.json").unlink(), "has no weights"),
    "truncated index": (lambda d: cut(d / "tensor-cache.json", 999), "is not valid JSON"),
    "wrong tensors": (rewrite_index, "missing model.norm.weight; surplus model.room.weight"),
    "truncated tokenizer": (lambda d: cut(d / "tokenizer.json", 3000), "is not a tokenizer"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "broken config": (lambda d: cut(d / "mlc-chat-config.json", 99), "is not valid JSON"),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", ARTIFACTS)
def test_broken_artifact(name: str, program: Program, artifact: Path, library: Path) -> None:
    break_it, words = ARTIFACTS[name]
    break_it(artifact)
    program.refuse("chat", artifact, "--model-lib", library, *ASK, words=words)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", "many"), ("conv_template", 5), ("model_type", ["llama"]), ("version", 7)],
)
def test_configuration_with_wrong_values(
    name: str, value: Any, program: Program, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "quantization": "q0f32", "model_config": {}, "vocab_size": 9}
    path = tmp_path / "mlc-chat-config.json"
    path.write_text(json.dumps({**config, name: value}))
    program.refuse("chat", tmp_path, *ASK, words=name)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages.__class__.__mro__ }}", "attribute '__class__' of a list"),
        (ENDLESS, "was still running after"),
        (TOO_MUCH, "writes more than"),
    ],
    ids=["attributes", "endless", "too much"],
)
def test_malicious_template(
    template: str, words: str, program: Program, artifact: Path, library: Path
) -> None:
    (artifact / "chat_template.jinja").write_text(template)
    program.refuse("chat", artifact, "--model-lib", library, *ASK, words=words)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("llama_gqa_f16 q4f16_1", "was compiled for another model: its vocab_size is 512"),
        ("qwen2_gqa q4f16_1", "was compiled for model_type llama, the model has qwen2"),
        ("llama_gqa_f16 q0f16", "was compiled for quantization q4f16_1, the model has q0f16"),
    ],
)
def test_library_of_another_model(
    case: str, words: str, program: Program, library: Path, tmp_path: Path
) -> None:
    from reference_cases import get_case

    name, quantization = case.split()
    for step in ("gen_config", "convert_weight"):
        source = get_case(name).directory
        program.must_run(step, source, "--quantization", quantization, "-o", tmp_path)
    program.refuse("chat", tmp_path, "--model-lib", library, *ASK, words=words)


@pytest.mark.cpu
def test_library_for_another_rotary_embedding(
    program: Program, artifact: Path, library: Path
) -> None:
    """Every tensor fits, and yet the answers would be wrong."""
    path = artifact / "mlc-chat-config.json"
    config = json.loads(path.read_text())
    config["model_config"]["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    path.write_text(json.dumps(config))
    program.refuse("chat", artifact, "--model-lib", library, *ASK, words="its rope_scaling is None")


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("other", "words"),
    [("arch", "CPUs, this machine is"), ("feature", "needs the CPU features")],
)
def test_library_for_another_cpu(
    other: str, words: str, program: Program, artifact: Path, library: Path, tmp_path: Path
) -> None:
    from mlc_llm.device import host_cpu

    cpu = host_cpu()
    name = cpu.arch if other == "arch" else cpu.isa[-1]
    content = library.read_bytes()
    changed = content.replace(f'"{name}"'.encode(), f'"{"z" * len(name)}"'.encode())
    assert changed != content
    (tmp_path / "lib.so").write_bytes(changed)
    program.refuse("chat", artifact, "--model-lib", tmp_path / "lib.so", *ASK, words=words)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("size", "words"), [(0, "cannot be loaded"), (50, "cannot be"), (100_000, "is truncated")]
)
def test_truncated_library(
    size: int, words: str, program: Program, artifact: Path, library: Path, tmp_path: Path
) -> None:
    (tmp_path / "lib.so").write_bytes(library.read_bytes()[:size])
    program.refuse("chat", artifact, "--model-lib", tmp_path / "lib.so", *ASK, words=words)


@pytest.mark.cpu
def test_prompt_longer_than_the_context(program: Program, artifact: Path, library: Path) -> None:
    command = ("chat", artifact, "--model-lib", library)
    program.refuse(*command, "--prompt", "word " * 600, words="maximum context length is 512")


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        ("context_window_size=256", 2, "was compiled with context_window_size=512"),
        ("context_window_size=many", 2, "must be a whole number, not 'many'"),
        ("tensor_parallel_shards=2", 2, "tensor_parallel_shards"),
    ],
)
def test_overrides_that_do_not_fit(
    overrides: str, code: int, words: str, program: Program, artifact: Path, library: Path
) -> None:
    command = ("chat", artifact, "--model-lib", library, "--overrides", overrides)
    program.refuse(*command, *ASK, words=words, code=code)


@pytest.mark.cpu
def test_context_that_no_memory_holds(program: Program, artifact: Path) -> None:
    overrides = ("--overrides", "context_window_size=2000000000")
    program.refuse("chat", artifact, *overrides, *ASK, words="lower context_window_size")
