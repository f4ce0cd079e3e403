"""`gen_config`, `convert_weight`, `compile` and `demo-model`: options, refusals, results."""

import json
from pathlib import Path
from typing import Any

import pytest

import mlc_llm.prepare.demo
import mlc_llm.prepare.resolve
from mlc_llm.artifact import read_chat_config, read_tensor_index
from mlc_llm.cli.main import main
from mlc_llm.errors import DownloadError


@pytest.fixture
def tiny_model() -> Path:
    """A Llama with two layers, as Hugging Face stores it."""
    return Path(__file__).resolve().parents[1] / "references" / "llama_gqa"


def test_weights_are_converted(tiny_model: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    command = ["convert_weight", str(tiny_model), "--quantization", "q0f32", "-o"]
    assert main([*command, str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "32.00 bits a parameter" in captured.err
    assert "model.embed_tokens.weight" in read_tensor_index(tmp_path / "out").records


def test_the_configuration_is_written_with_the_limits_given(  # type: ignore[no-untyped-def]
    tiny_model: Path, tmp_path: Path, capsys
) -> None:
    limits = "--context-window-size 128 --prefill-chunk-size 32 --max-batch-size 4"
    command = ["gen_config", str(tiny_model), "--quantization", "q4f16_1", *limits.split()]
    assert main([*command, "-o", str(tmp_path)]) == 0
    assert "mlc-chat-config.json" in capsys.readouterr().err
    config = read_chat_config(tmp_path)
    assert (config.quantization, config.context_window_size) == ("q4f16_1", 128)
    assert config.prefill_chunk_size == 32
    assert config.model_config["max_batch_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("gen_config {m} --quantization q9 -o {o}", 2, "q9"),
        ("gen_config {m} --quantization q0f32 -o {o} --tensor-parallel-shards 2", 2, "shards is 2"),
        ("gen_config {m} --quantization q0f32 -o {o} --pipeline-parallel-stages 3", 2, "stages is"),
        ("gen_config {m} --quantization q0f32 -o {o} --context-window-size 0", 2, "context_window"),
        ("gen_config {m}/no --quantization q0f32 -o {o}", 1, "does not exist"),
        ("gen_config {o} --quantization q0f32 -o {o}", 1, "is empty"),
        ("convert_weight {m} --quantization q9 -o {o}", 2, "q9"),
        ("convert_weight {m} --quantization q0f32 -o {o} --device cuda", 2, "--device cuda"),
        ("convert_weight {m} --quantization q0f32 -o {o} --source {m}/no", 1, "does not exist"),
        ("convert_weight {m} --quantization q0f32 -o {o} --source-format zip", 2, "zip"),
        ("convert_weight {m} --quantization q0f32 -o {o} --model-type mamba", 2, "mamba"),
        ("compile {m} -o {o}/lib.so", 2, "--quantization NAME must be given"),
        ("compile {m} --quantization q0f32 -o {o}/lib.zip", 2, "lib.zip"),
        ("compile {m}/no --quantization q0f32 -o {o}/lib.so", 1, "does not exist"),
        ("compile {m} --quantization q0f32 -o {o}/lib.so --device znver9", 2, "znver4"),
        ("compile {m} --quantization q0f32 -o {o}/lib.so --device cuda:sm_1", 2, "sm_90"),
        ("compile {m} --quantization q0f32 -o {o}/lib.so --overrides x=1", 2, "unknown key 'x'"),
        ("compile {m} --quantization q0f32 -o {o}/l.so --system-lib-prefix a_", 2, "without a pre"),
    ],
)
def test_mistakes_are_explained(  # type: ignore[no-untyped-def]
    tiny_model: Path, tmp_path: Path, capsys, arguments: str, code: int, words: str
) -> None:
    assert main(arguments.format(m=tiny_model, o=tmp_path).split()) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_sources_and_formats_are_passed_on(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    seen: dict[str, Any] = {}

    def convert_weights(config_path: Path, output: Path, **options: Any) -> Any:
        seen.update(options, config_path=config_path, output=output)
        raise DownloadError("stop here")

    monkeypatch.setattr(mlc_llm.prepare.resolve, "convert_weights", convert_weights)
    command = "convert_weight conf --quantization q0f32 -o out --source src --source-format gguf"
    command += " --model-type qwen2 --device cpu --lora-adapter adapter"
    assert main(command.split()) == 1
    del seen["progress"]
    assert seen == {
        "config_path": Path("conf"),
        "output": Path("out"),
        "quantization": "q0f32",
        "model_type": "qwen2",
        "source": Path("src"),
        "source_format": "gguf",
        "lora_adapter": Path("adapter"),
    }


def test_the_demo_model_goes_into_the_cache(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    seen: dict[str, Any] = {}

    def install(home: Any, policy: Any, progress: Any) -> Path:
        seen.update(root=home.root, policy=policy.value)
        return Path("model.gguf")

    monkeypatch.setattr(mlc_llm.prepare.demo, "install_demo_model", install)
    monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path))
    monkeypatch.setenv("MLC_DOWNLOAD_CACHE_POLICY", "REDO")
    assert main(["demo-model"]) == 0
    assert seen == {"root": tmp_path, "policy": "REDO"}


@pytest.mark.cpu
@pytest.mark.parametrize("form", ["directory", "config.json", "artifact"])
def test_a_library_is_compiled_and_its_memory_printed(  # type: ignore[no-untyped-def]
    tiny_model: Path, tmp_path: Path, capsys, form: str
) -> None:
    model, options = tiny_model, ["--quantization", "q0f32"]
    if form == "config.json":
        model = tmp_path / "config.json"
        model.write_text((tiny_model / "config.json").read_text())
    elif form == "artifact":
        command = ["gen_config", str(tiny_model), *options, "-o", str(tmp_path / "artifact")]
        assert main(command) == 0
        model, options = tmp_path / "artifact" / "mlc-chat-config.json", []
    library, dump = tmp_path / "new" / "lib.so", tmp_path / "dump"
    command = ["compile", str(model), *options, "-o", str(library), "--debug-dump", str(dump)]
    assert main([*command, "--overrides", "context_window_size=256"]) == 0
    captured = capsys.readouterr()
    assert library.stat().st_size > 10_000
    assert "KV cache" in captured.out
    assert "context of 256 tokens" in captured.out
    assert f"wrote {library}" in captured.err
    assert (dump / "debug-phase0.py").is_file()
    assert [path.name for path in library.parent.iterdir()] == ["lib.so"]


@pytest.mark.cpu
def test_compiling_needs_a_linker(tiny_model: Path, tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", "")
    command = ["compile", str(tiny_model), "--quantization", "q0f32", "-o"]
    assert main([*command, str(tmp_path / "lib.so")]) == 1
    assert "needs a linker" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_broken_configuration_is_named(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mlc-chat-config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["compile", str(tmp_path), "-o", str(tmp_path / "lib.so")]) == 1
    assert "lacks 'quantization'" in capsys.readouterr().err
