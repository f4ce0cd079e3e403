"""Artifacts that hold more than our own, as MLC LLM's do, give the parameters of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mlc_packer import pack_artifact
from reference_cases import get_case
from tiny_models import TinyModels

from mlc_llm.artifact import read_tensor_index
from mlc_llm.errors import ParameterMismatch
from mlc_llm.runtime.library import load_library
from mlc_llm.runtime.parameters import load_parameters

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("name", "quantization", "surplus"),
    [("deepseek_v2", "q4f16_1", "q_weight"), ("deepseek_v3", "q0f32", "weight")],
)
def test_whole_of_what_is_split_is_left_alone(
    tiny_models: TinyModels, name: str, quantization: str, surplus: str, tmp_path: Path
) -> None:
    pack_artifact(get_case(name).directory, tmp_path, quantization)
    stored = read_tensor_index(tmp_path).records
    assert f"model.layers.0.self_attn.kv_b_proj.{surplus}" in stored
    library = load_library(tiny_models.library(name, quantization))
    loaded = load_parameters(tmp_path, library, lambda _: None)
    expected = load_parameters(tiny_models.artifact(name, quantization), library, lambda _: None)
    for found, ours in zip(loaded, expected, strict=True):
        assert (found.shape, found.dtype) == (ours.shape, ours.dtype)
        # Float32 lies in their files with the precision of bfloat16.
        if quantization == "q0f32":
            assert np.allclose(found, ours, rtol=2**-7, atol=1e-30)


def test_other_surplus_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    pack_artifact(get_case("deepseek_v2").directory, tmp_path, "q0f32")
    index = tmp_path / "tensor-cache.json"
    name = "self_attn.kv_b_proj"
    index.write_text(index.read_text().replace(f"layers.0.{name}", "layers.0.self_attn.other"))
    library = load_library(tiny_models.library("deepseek_v2"))
    with pytest.raises(ParameterMismatch, match=r"surplus model\.layers\.0\.self_attn\.other"):
        load_parameters(tmp_path, library, lambda _: None)
