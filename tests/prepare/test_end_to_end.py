"""A raw model becomes an artifact and a library, with the real converter and compiler."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hub import LocalHub
from recorder import RecordedProgress
from safetensors.numpy import load_file, save_file
from tiny import write_llama

from mlc_llm.artifact import LibraryMetadata, read_chat_config, read_tensor_index
from mlc_llm.errors import OptionError, ParameterMismatch, UnsupportedModel
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.download import HubAccess
from mlc_llm.prepare.jit import prepare_library
from mlc_llm.prepare.original import read_compile_config
from mlc_llm.prepare.resolve import (
    convert_weights,
    prepare_artifact,
    write_chat_config_for,
)
from mlc_llm.runtime.library import load_library

pytestmark = pytest.mark.cpu


@pytest.fixture
def raw_model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny-llama")


def prepare(model: Path | str, home: CacheHome, progress: RecordedProgress, hub: str = "") -> Path:
    return prepare_artifact(
        str(model),
        quantization="q0f32",
        home=home,
        download_policy=CachePolicy.ON,
        jit_policy=CachePolicy.ON,
        progress=progress,
        access=HubAccess(hub or None),
    )


def test_an_adapter_is_merged_and_kept_apart(
    raw_model: Path, tmp_path: Path, home: CacheHome, progress: RecordedProgress
) -> None:
    name = "model.layers.0.self_attn.o_proj"
    weight = load_file(raw_model / "model.safetensors")[f"{name}.weight"].astype(np.float32)
    rng = np.random.default_rng(2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    down = rng.standard_normal((2, weight.shape[1])).astype(np.float32)
    up = rng.standard_normal((len(weight), 2)).astype(np.float32)
    parts = {f"base_model.model.{name}.lora_A.weight": down}
    parts[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(parts, adapter / "adapter_model.safetensors")

    def prepare_with(lora_adapter: Path | None, **changes: str) -> Path:
        return prepare_artifact(
            **{"model": str(raw_model), "quantization": "q0f32", **changes},
            home=home,
            download_policy=CachePolicy.ON,
            jit_policy=CachePolicy.ON,
            progress=progress,
            lora_adapter=lora_adapter,
        )

    merged, plain = prepare_with(adapter), prepare_with(None)
    assert merged != plain and "adapter" in merged.name
    found = read_tensor_index(merged).read(f"{name}.weight")
    np.testing.assert_allclose(found, weight + 2 * up @ down, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(read_tensor_index(plain).read(f"{name}.weight"), weight)
    assert prepare_with(adapter) == merged
    config["lora_alpha"] = 8
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    again = prepare_with(adapter)
    assert again != merged
    found = read_tensor_index(again).read(f"{name}.weight")
    np.testing.assert_allclose(found, weight + 4 * up @ down, rtol=1e-5, atol=1e-5)
    with pytest.raises(OptionError, match="converted already, an adapter cannot be merged"):
        prepare_with(adapter, model=str(plain))
    with pytest.raises(OptionError, match="autoawq keeps the integers of the checkpoint"):
        prepare_with(adapter, quantization="q4f16_autoawq")


def test_directory_becomes_artifact_and_library(
    raw_model: Path, home: CacheHome, progress: RecordedProgress
) -> None:
    artifact = prepare(raw_model, home, progress)
    config = read_chat_config(artifact)
    assert (config.model_type, config.quantization) == ("llama", "q0f32")
    assert (artifact / "tokenizer.json").is_file()
    index = read_tensor_index(artifact)
    index.verify_checksums()
    original = load_file(raw_model / "model.safetensors")
    stored = index.read("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_array_equal(stored, original["model.layers.1.mlp.down_proj.weight"])

    def library(opt: str = "O2") -> Path:
        return prepare_library(
            artifact,
            device="cpu",
            opt=opt,
            overrides={"context_window_size": 64},
            home=home,
            jit_policy=CachePolicy.ON,
            progress=progress,
        )

    path = library()
    text = (path / "metadata.json").read_text()
    metadata = LibraryMetadata.from_json(text, str(path))
    assert metadata.context_window_size == 64
    index.check(metadata.params, str(artifact))
    num_stages = len(progress.stages)
    assert prepare(raw_model, home, progress) == artifact
    assert library() == path
    assert len(progress.stages) == num_stages
    converting, compiling = progress.stages
    assert converting.name == "Converting tiny-llama to q0f32"
    assert converting.done == converting.total
    assert compiling.name == "Compiling llama q0f32"
    assert converting.is_finished and compiling.is_finished


def test_compiling_needs_no_program(
    raw_model: Path,
    home: CacheHome,
    progress: RecordedProgress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    library = prepare_library(
        prepare(raw_model, home, progress),
        device="auto",
        opt="O0",
        overrides={},
        home=home,
        jit_policy=CachePolicy.ON,
        progress=progress,
    )
    assert load_library(library).metadata.model_type == "llama"


def test_repository_becomes_the_same_artifact(
    raw_model: Path, home: CacheHome, progress: RecordedProgress, hub: LocalHub
) -> None:
    hub.add("user/tiny", {path.name: path.read_bytes() for path in raw_model.iterdir()})
    fetched = prepare("HF://user/tiny", home, progress, hub.endpoint)
    local = prepare(raw_model, home, progress)
    assert fetched != local
    for name in ("mlc-chat-config.json", "tensor-cache.json", "params_shard_0.bin"):
        assert (fetched / name).read_bytes() == (local / name).read_bytes()


def test_the_two_steps_make_what_one_step_makes(
    raw_model: Path, home: CacheHome, progress: RecordedProgress, tmp_path: Path
) -> None:
    output = tmp_path / "steps"
    write_chat_config_for(
        raw_model / "config.json",
        output,
        quantization="q4f16_1",
        overrides={"context_window_size": 64},
    )
    summary = convert_weights(raw_model, output, quantization="q4f16_1", progress=progress)
    config = read_chat_config(output)
    assert (config.quantization, config.context_window_size) == ("q4f16_1", 64)
    assert len(read_tensor_index(output).records) == summary.num_tensors


def test_weights_may_lie_elsewhere(
    raw_model: Path, progress: RecordedProgress, tmp_path: Path
) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    (raw_model / "config.json").rename(configs / "config.json")
    (raw_model / "config.json").write_text((configs / "config.json").read_text())
    output = tmp_path / "output"
    convert_weights(configs, output, quantization="q0f16", source=raw_model, progress=progress)
    assert read_tensor_index(output).records


def test_compiling_needs_no_weights(raw_model: Path, tmp_path: Path) -> None:
    write_chat_config_for(raw_model, tmp_path / "output", quantization="q0f32")
    (raw_model / "model.safetensors").unlink()
    config = read_compile_config(raw_model, quantization="q0f32")
    written = read_chat_config(tmp_path / "output")
    for name in ("model_type", "quantization", "model_config", "vocab_size", "prefill_chunk_size"):
        assert getattr(config, name) == getattr(written, name)


def test_bad_limits_are_refused(raw_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="context_window_size"):
        write_chat_config_for(
            raw_model,
            tmp_path / "output",
            quantization="q0f32",
            overrides={"context_window_size": -5},
        )


def test_unsupported_architecture(
    raw_model: Path, home: CacheHome, progress: RecordedProgress
) -> None:
    config = json.loads((raw_model / "config.json").read_text())
    config.update(architectures=["MambaForCausalLM"], model_type="mamba")
    (raw_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"MambaForCausalLM .* LlamaForCausalLM"):
        prepare(raw_model, home, progress)


def test_missing_tensor_leaves_no_artifact(
    raw_model: Path, home: CacheHome, progress: RecordedProgress
) -> None:
    tensors = load_file(raw_model / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, raw_model / "model.safetensors")
    with pytest.raises(ParameterMismatch, match=r"missing model\.norm\.weight"):
        prepare(raw_model, home, progress)
    assert not [p for p in home.local_directory.iterdir() if (p / "tensor-cache.json").exists()]
    save_file({**tensors, "model.norm.weight": norm}, raw_model / "model.safetensors")
    assert read_tensor_index(prepare(raw_model, home, progress)).records


@pytest.mark.weights
def test_gguf_file_becomes_an_artifact(
    demo_gguf: Path, home: CacheHome, progress: RecordedProgress
) -> None:
    home.demo_directory.mkdir(parents=True)
    (home.demo_directory / demo_gguf.name).symlink_to(demo_gguf)
    artifact = prepare_artifact(
        None,
        quantization=None,
        home=home,
        download_policy=CachePolicy.READONLY,
        jit_policy=CachePolicy.ON,
        progress=progress,
    )
    config = read_chat_config(artifact)
    assert (config.model_type, config.quantization) == ("llama", "gguf")
    assert (config.temperature, config.top_p) == (0.2, 0.9)
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in artifact.iterdir()}
    assert "lm_head.q_weight" not in read_tensor_index(artifact).records
