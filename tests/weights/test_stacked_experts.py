"""Checkpoints of models with experts: stacked or one by one, whole or not, quantized or not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlc_packer import pack_artifact
from numpy.typing import NDArray
from numpy_model import read_weights
from reference_cases import get_case
from safetensors.numpy import save_file

from mlc_llm.artifact import TensorIndex, read_tensor_index
from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import convert_weights

NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def write(case: str, directory: Path, weights: Mapping[str, NDArray[Any]]) -> Path:
    """Write a checkpoint of a case with other weights."""
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(get_case(case).directory / name, directory / name)
    arrays = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    save_file(arrays, directory / "model.safetensors")
    return directory


def convert(source: Path, output: Path, quantization: str = "q0f32") -> TensorIndex:
    convert_weights(source, output, quantization=quantization, progress=NullProgress())
    return read_tensor_index(output)


def stack(case: str) -> dict[str, NDArray[Any]]:
    """Return the weights of a case as transformers 5 holds them in memory."""
    block, gate_up, down = NAMES[case]
    weights = read_weights(get_case(case).directory)
    stacked = {name: w for name, w in weights.items() if ".experts." not in name}
    stacked = {name.replace("block_sparse_moe", "mlp"): w for name, w in stacked.items()}
    layers = {name.split(".experts.")[0] for name in weights if ".experts." in name}
    assert layers
    for layer in layers:
        count = len([n for n in weights if re.match(rf"{layer}\.experts\.\d+\.{down}\.", n)])

        def expert(e: int, part: str, layer: str = layer) -> NDArray[Any]:
            return weights[f"{layer}.experts.{e}.{part}.weight"]

        theirs = layer.replace(block, "mlp") + ".experts."
        stacked[theirs + "gate_up_proj"] = np.stack(
            [np.concatenate([expert(e, part) for part in gate_up]) for e in range(count)]
        )
        stacked[theirs + "down_proj"] = np.stack([expert(e, down) for e in range(count)])
    return stacked


@pytest.mark.parametrize("case", NAMES)
def test_stacked_experts_are_those_of_the_usual_checkpoint(tmp_path: Path, case: str) -> None:
    usual = convert(get_case(case).directory, tmp_path / "usual")
    stacked = convert(write(case, tmp_path / "model", stack(case)), tmp_path / "stacked")
    assert sorted(stacked.records) == sorted(usual.records)
    for name in usual.records:
        np.testing.assert_array_equal(stacked.read(name), usual.read(name))


def test_too_few_stacked_experts_are_named(tmp_path: Path) -> None:
    weights = stack("mixtral")
    name = "model.layers.1.mlp.experts.down_proj"
    weights[name] = weights[name][:5]
    with pytest.raises(ParameterMismatch, match=rf"{name} is \[5, 32, 48\] and has no .*\.5\.w2"):
        convert(write("mixtral", tmp_path / "model", weights), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", (40, 32), "w1.weight"),
        ("model.layers.0.block_sparse_moe.experts.5.w2.weight", (32, 40), "e2.weight must have"),
        ("model.layers.0.block_sparse_moe.experts.5.w2.weight", None, "missing .*experts.5.w2"),
    ],
)
def test_an_expert_of_another_size_or_none(
    tmp_path: Path, name: str, shape: tuple[int, int] | None, message: str
) -> None:
    weights = read_weights(get_case("mixtral").directory)
    if shape is None:
        del weights[name]
    else:
        weights[name] = np.zeros(shape, np.float32)
    with pytest.raises(ParameterMismatch, match=message):
        convert(write("mixtral", tmp_path / "model", weights), tmp_path / "out")


@pytest.mark.parametrize("quantization", ["q3f16_1", "q4f16_0", "q4f16_1", "q8f16_1"])
@pytest.mark.parametrize("case", NAMES)
def test_quantized_experts_equal_the_independent_packer(
    tmp_path: Path, case: str, quantization: str
) -> None:
    """Gates stay as they are, experts are never transposed."""
    # Float16 weights, because MLC LLM rounds to the model's dtype before it quantizes.
    weights = read_weights(get_case(case).directory)
    half = {name: weight.astype(np.float16) for name, weight in weights.items()}
    source = write(case, tmp_path / "model", half)
    ours = convert(source, tmp_path / "ours", quantization)
    pack_artifact(source, tmp_path / "theirs", quantization)
    theirs = read_tensor_index(tmp_path / "theirs")
    assert sorted(ours.records) == sorted(theirs.records)
    assert any(name.endswith("gate.weight") for name in ours.records)
    for name, record in ours.records.items():
        assert record.spec == theirs.records[name].spec
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


def test_schemes_without_experts_say_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot hold the experts .* choose q4f16_1"):
        convert(get_case("mixtral").directory, tmp_path / "out", "e4m3_e4m3_f16")


@pytest.mark.parametrize(
    "edit", [{"num_experts_per_tok": 7}, {"num_local_experts": 0}, {"num_local_experts": "6"}]
)
def test_impossible_numbers_of_experts(tmp_path: Path, edit: dict[str, Any]) -> None:
    directory = write("mixtral", tmp_path / "model", {"x": np.zeros(1, np.float32)})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **edit}))
    with pytest.raises(CorruptFile, match="experts"):
        convert(directory, tmp_path / "out")
