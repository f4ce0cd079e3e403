"""Whole checkpoints converted by each scheme, against the independent packer of the layout."""

import ml_dtypes
import numpy as np
import pytest
from mlc_packer import pack_artifact
from reference_cases import REFERENCES, read_cases

from mlc_llm.artifact import read_tensor_index
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import plan_parameters
from mlc_llm.quantization.schemes import get_scheme
from mlc_llm.weights.convert import convert
from mlc_llm.weights.open import open_source


def convert_model(directory, quantization, output):
    source = open_source(directory)
    family = find_family(source.config)
    config = family.config_from_huggingface(source.config)
    plan = plan_parameters(family, config, get_scheme(quantization))
    convert(plan, source, output, lambda done, total, name: None, family.unused)
    return read_tensor_index(output)


def pack(directory, quantization, output):
    pack_artifact(directory, output, quantization)
    return read_tensor_index(output)


# Float16 weights, because MLC LLM rounds to the model's dtype before it quantizes and we do not.
@pytest.mark.parametrize("quantization", ["q0f16", "q3f16_1", "q4f16_0", "q4f16_1", "q8f16_1"])
def test_every_bit_equals_the_independent_packer(tmp_path, quantization):
    directory = REFERENCES / "llama_gqa_f16"
    ours = convert_model(directory, quantization, tmp_path / "ours")
    theirs = pack(directory, quantization, tmp_path / "theirs")
    assert sorted(ours.records) == sorted(theirs.records)
    for name, record in ours.records.items():
        assert record.spec == theirs.records[name].spec
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


@pytest.mark.parametrize("case", read_cases(), ids=str)
def test_every_model_has_the_names_and_values_of_the_layout(tmp_path, case):
    ours = convert_model(case.directory, "q0f32", tmp_path / "ours")
    theirs = pack(case.directory, "q0f32", tmp_path / "theirs")
    # Halves of `kv_b_proj` are stored alone here, beside the whole there.
    wanted = [name for name in theirs.records if "kv_b_proj" not in name]
    assert sorted(ours.records) == sorted(wanted)
    for name, record in ours.records.items():
        assert record.spec == theirs.records[name].spec
        # MLC LLM's files carry float32 as bfloat16; ours carry it whole.
        rounded = ours.read(name).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(rounded, theirs.read(name))


def test_bfloat16_weights_pass_through(tmp_path):
    directory = REFERENCES / "qwen2_tied_bf16"
    ours = convert_model(directory, "q0bf16", tmp_path / "ours")
    theirs = pack(directory, "q0bf16", tmp_path / "theirs")
    for name in theirs.records:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


@pytest.mark.weights
def test_demo_model_fits_its_plan(demo_gguf, tmp_path):
    index = convert_model(demo_gguf, "q8f16_1", tmp_path)
    index.verify_checksums()
    assert len(index.records) == 303
    assert index.records["model.embed_tokens.q_weight"].spec.shape == (49152, 144)
