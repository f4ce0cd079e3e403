"""GGUF architectures: names against the gguf package's own map, values, refusals."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import (
    CASES,
    EXPERTS,
    OWN_ARITHMETIC,
    STORED_AS,
    tensor_names,
    write_model,
)
from make_gguf import HIDDEN, VOCAB, write_gguf

from mlc_llm.errors import ParameterMismatch
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.gguf_architectures import ARCHITECTURES


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_as_hugging_face_has_it(tmp_path, name):
    path, expected = write_model(tmp_path / "m.gguf", name)
    source = GGUFSource(path)
    assert sorted(source.names()) == sorted(expected)
    for tensor_name, tensor in expected.items():
        assert source.shape(tensor_name) == tensor.shape
        found = source.read(tensor_name)
        np.testing.assert_allclose(found, tensor, rtol=1e-6, atol=1e-6)
    assert source.config["architectures"] == [CASES[name].class_name]
    assert source.config["model_type"] == CASES[name].model_type


@pytest.mark.parametrize("name", (*CASES, *OWN_ARITHMETIC))
def test_names_are_those_of_the_packages_map(name):
    names = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    kind = names[STORED_AS.get(name, name)]
    mapping = gguf.get_tensor_name_map(kind, 2)
    for gguf_name, huggingface_name in tensor_names({**ARCHITECTURES, **CASES}[name]).items():
        if "{expert}" in huggingface_name:
            # The converter stacks them under a name without the number.
            huggingface_name = huggingface_name.replace("experts.{expert}", "experts")
        if name == "chatglm":
            huggingface_name = huggingface_name.removeprefix("transformer.")
        found = mapping.get_name(huggingface_name, try_suffixes=(".weight",))
        assert found == gguf_name, huggingface_name


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_quantized_experts_are_read_alone(tmp_path, name, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q8_0
    path, expected = write_model(tmp_path / "m.gguf", name, quantization=kind)
    source = GGUFSource(path)
    experts = [name for name in expected if ".experts." in name]
    assert len(experts) == 3 * EXPERTS
    sizes = []
    whole = gguf.dequantize

    def counted(data, qtype):
        sizes.append(data.nbytes)
        return whole(data, qtype)

    monkeypatch.setattr("gguf.dequantize", counted)
    for tensor_name in experts:
        tensor = expected[tensor_name]
        found = source.read(tensor_name)
        np.testing.assert_array_equal(found, whole(gguf.quantize(tensor, kind), kind))
        codes = source.read_encoded(tensor_name)
        assert codes is not None and codes.codes.shape == tensor.shape
    assert max(sizes) == 32 * HIDDEN // 32 * 34


def test_experts_in_mxfp4(tmp_path):
    kind = gguf.GGMLQuantizationType.MXFP4
    path, expected = write_model(tmp_path / "m.gguf", "gpt-oss", quantization=kind)
    source = GGUFSource(path)
    for name in (name for name in expected if ".experts." in name):
        stored = gguf.dequantize(gguf.quantize(expected[name], kind), kind)
        np.testing.assert_array_equal(source.read(name), stored)
        assert source.read_encoded(name) is None
        error = np.linalg.norm(stored - expected[name])
        assert error < 0.2 * np.linalg.norm(expected[name])


def test_codes_follow_the_order_of_rows(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("llama", "gptneox", "gpt2"):
        path, expected = write_model(tmp_path / f"{name}.gguf", name, quantization=kind)
        source = GGUFSource(path)
        for tensor_name, tensor in expected.items():
            codes = source.read_encoded(tensor_name)
            if tensor.ndim == 1 or (name == "gpt2" and ".h." in tensor_name):
                assert codes is None
                continue
            assert codes is not None
            scale = np.repeat(codes.scale, codes.codes.shape[1] // codes.scale.shape[1], axis=1)
            values = (codes.codes.astype(np.float32) - codes.zero) * scale
            np.testing.assert_allclose(values, source.read(tensor_name), rtol=1e-6)


def test_the_page_lists_every_architecture():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert not [name for name in ARCHITECTURES if f"`{name}`" not in page]


def test_unknown_names_stay(tmp_path):
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    strange = ["blk.0.attn_sinks.weight", "blk.x.attn_q.weight", "blk.0.attn_q", "blk..weight"]
    strange.append(f"blk.{'9' * 5000}.attn_q.weight")
    tensors |= {name: np.zeros(32, np.float32) for name in strange}
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors))
    assert sorted(source.names()) == sorted(["model.embed_tokens.weight", *strange])
    with pytest.raises(ParameterMismatch, match=r"no tensor for token_embd"):
        source.read("token_embd.weight")


@pytest.mark.parametrize("name", ["llama", "gptneox"])
def test_rows_that_heads_cannot_share(tmp_path, name):
    part = "attn_q" if name == "llama" else "attn_qkv"
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    tensors[f"blk.0.{part}.weight"] = np.zeros((7, HIDDEN), np.float32)
    metadata = {"attention.layer_norm_epsilon": 1e-5}
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors, arch=name, metadata=metadata))
    with pytest.raises(ParameterMismatch, match="has 7 rows, which 4 heads cannot share"):
        source.read(source.names()[-1])
