"""Qwen3.5 in GGUF files: what a reference has not."""

import gguf
import numpy as np
import pytest
from gguf_hybrid_cases import hybrid_metadata, store_hybrid
from make_gguf import FFN, HIDDEN, VOCAB, write_gguf

from mlc_llm.errors import CorruptFile
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.formats import OTHER_ENCODING
from mlc_llm.weights.gguf import GGUFSource

_OUT = "model.layers.0.linear_attn.out_proj.weight"


def linear_config(value_dim):
    return {
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": value_dim,
    }


def write(path, value_dim=32, metadata=None, tensors=None):
    """Write a file with an output matrix of linear attention; return it and the matrix."""
    config = linear_config(value_dim)
    width = 4 * value_dim
    matrix = np.random.default_rng(3).standard_normal((HIDDEN, width)).astype(np.float32)
    stored = {
        "token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32),
        "blk.0.ssm_out.weight": store_hybrid(_OUT, matrix, config),
        **(tensors or {}),
    }
    values = {**hybrid_metadata(config), **(metadata or {})}
    kind = gguf.GGMLQuantizationType.Q8_0
    return write_gguf(path, stored, arch="qwen35", metadata=values, quantization=kind), matrix


def test_codes_of_columns_follow_the_order_of_heads(tmp_path):
    path, matrix = write(tmp_path / "m.gguf")
    source = GGUFSource(path)
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(matrix, kind), kind)
    np.testing.assert_array_equal(source.read(_OUT), expected)
    codes = source.read_encoded(_OUT)
    assert codes is not None and source.encoding(_OUT) != OTHER_ENCODING
    scale = np.repeat(codes.scale, 32, axis=1)
    values = (codes.codes.astype(np.float32) - codes.zero) * scale
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_codes_that_heads_share_are_decoded(tmp_path):
    source = GGUFSource(write(tmp_path / "m.gguf", value_dim=8)[0])
    assert source.encoding(_OUT) == OTHER_ENCODING
    assert source.read_encoded(_OUT) is None


def test_layers_for_further_tokens_are_left_out(tmp_path):
    further = {"blk.1.ffn_up.weight": np.zeros((FFN, HIDDEN), np.float32)}
    metadata = {"block_count": 2, "nextn_predict_layers": 1}
    path, _ = write(tmp_path / "m.gguf", metadata=metadata, tensors=further)
    source = GGUFSource(path)
    assert source.config["num_hidden_layers"] == 1
    assert sorted(source.names()) == ["model.embed_tokens.weight", _OUT]
    path, _ = write(tmp_path / "n.gguf", metadata={"nextn_predict_layers": 1})
    with pytest.raises(CorruptFile, match="1 of 1 layers predict further tokens"):
        GGUFSource(path)


def test_rotary_embedding_and_kinds_of_layers(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    scaling = {f"rope.scaling.{key}": value for key, value in yarn.items()}
    sizes = {"block_count": 3, "full_attention_interval": 3, "rope.dimension_count": 8}
    path, _ = write(tmp_path / "m.gguf", metadata={**scaling, **sizes})
    content = GGUFSource(path).config
    config = find_family(content).config_from_huggingface(content)
    assert (config.rotary_dim, config.rope_scaling["factor"]) == (8, 4)
    assert config.layer_types == ["linear_attention", "linear_attention", "full_attention"]


@pytest.mark.parametrize("change", [{"ssm.inner_size": 129}, {"ssm.group_count": 3}])
def test_heads_that_do_not_fit(tmp_path, change):
    with pytest.raises(CorruptFile, match="cannot be shared evenly"):
        GGUFSource(write(tmp_path / "m.gguf", metadata=change)[0])
