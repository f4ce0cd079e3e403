"""GGUF checkpoints: encodings, names, row order, configuration."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from make_gguf import (
    HEADS,
    HF_NAMES,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    finish,
    interleave_halves,
    make_tensors,
    write_gguf,
)

from mlc_llm.errors import CorruptFile, ParameterMismatch, UnsupportedModel
from mlc_llm.weights.gguf import ARCHITECTURES, GGUFSource
from mlc_llm.weights.gguf_file import GGUFFile
from mlc_llm.weights.gguf_rope import llama3_factors


def hf_name(name):
    stem, _, kind = name.rpartition(".")
    return f"{HF_NAMES[stem]}.{kind}"


@pytest.fixture
def llama(tmp_path):
    return write_gguf(tmp_path / "model.gguf", make_tensors())


@pytest.mark.parametrize(
    "kind",
    [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.F16, Type.BF16, Type.F32],
)
def test_every_encoding_equals_the_packages_own_decoder(tmp_path, kind):
    tensors = make_tensors()
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors, arch="qwen2", quantization=kind))
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(tensor, kind), kind)
        found = source.read(hf_name(name))
        assert source.shape(hf_name(name)) == tensor.shape == found.shape
        np.testing.assert_array_equal(found.astype(np.float32), expected)
    dtypes = {Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
    assert source.read("lm_head.weight").dtype == np.dtype(dtypes.get(kind, np.float32))


@pytest.mark.parametrize(
    "kind",
    [
        *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS),
        *(Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS),
        *(Type.IQ3_S, Type.TQ1_0, Type.TQ2_0, Type.MXFP4),
    ],
)
def test_super_block_encodings(tmp_path, kind):
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 40, 2 * block_values
    rng = np.random.default_rng(3)
    # Small bytes make small half precision scales: no infinities.
    raw = rng.integers(0, 60, (rows, columns // block_values * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    finish(writer)
    found = GGUFFile(tmp_path / "m.gguf").read("x")
    assert found.shape == (rows, columns)
    np.testing.assert_array_equal(found, gguf.dequantize(raw, kind))


def test_large_tensors_are_decoded_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("mlc_llm.weights.gguf_file._BLOCK_VALUES", 3 * HIDDEN)
    tensors = make_tensors()
    path = write_gguf(tmp_path / "m.gguf", tensors, quantization=Type.Q8_0)
    expected = gguf.dequantize(gguf.quantize(tensors["output.weight"], Type.Q8_0), Type.Q8_0)
    np.testing.assert_array_equal(GGUFSource(path).read("lm_head.weight"), expected)


def test_query_and_key_rows_are_put_back_for_llama(tmp_path):
    original = make_tensors(bias=True)
    stored = dict(original)
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        for kind in ("weight", "bias"):
            name = f"blk.0.attn_{part}.{kind}"
            stored[name] = interleave_halves(original[name], heads)
            assert not np.array_equal(stored[name], original[name])
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", stored))
    assert sorted(source.names()) == sorted(hf_name(name) for name in original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(source.read(hf_name(name)), tensor)
    assert source.config["attention_bias"] is True


def test_query_rows_of_qwen2_stay(tmp_path):
    tensors = make_tensors(bias=True)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors, arch="qwen2"))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(hf_name(name)), tensor)
    assert source.config["architectures"] == ["Qwen2ForCausalLM"]


def test_config(llama):
    source = GGUFSource(llama)
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": VOCAB,
        "torch_dtype": "float32",
    }
    assert source.files() == [llama]


def test_config_of_a_tied_half_precision_model(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        make_tensors(tied=True),
        quantization=Type.F16,
        remove=("attention.head_count_kv", "rope.freq_base"),
        metadata={"attention.head_count": 4},
    )
    config = GGUFSource(path).config
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] == 4
    assert config["rope_theta"] == 10000.0
    assert config["torch_dtype"] == "float16"


def test_head_dim_of_its_own(tmp_path):
    metadata = {"attention.key_length": 32, "attention.value_length": 32}
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), metadata=metadata)
    assert GGUFSource(path).config["head_dim"] == 32


def test_equal_values_for_every_layer_are_one_value(tmp_path):
    metadata = {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), metadata=metadata)
    assert GGUFSource(path).config["num_key_value_heads"] == 2


def test_linear_rope_scaling(tmp_path):
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), metadata=metadata)
    assert GGUFSource(path).config["rope_scaling"] == {
        "rope_type": "linear",
        "type": "linear",
        "factor": 4.0,
    }


def scaled(tmp_path, factors, head_dim=128):
    metadata = {"attention.key_length": head_dim, "attention.value_length": head_dim}
    metadata["rope.freq_base"] = 500000.0
    tensors = make_tensors() | {"rope_freqs.weight": factors.astype(np.float32)}
    return write_gguf(tmp_path / "m.gguf", tensors, metadata=metadata)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("factor", "low", "high", "context"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 8.0, 2048), (16.0, 2.0, 6.0, 4096)],
)
def test_llama3_rope_scaling_is_found_from_its_factors(
    tmp_path, head_dim, factor, low, high, context
):
    frequencies = 500000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    factors = llama3_factors(frequencies, factor, low, high, context)
    source = GGUFSource(scaled(tmp_path, factors, head_dim))
    found = source.config["rope_scaling"]
    assert found["rope_type"] == "llama3"
    assert found["factor"] == factor
    # Only these ratios matter, so a file cannot tell more.
    turns_low = found["original_max_position_embeddings"] / found["low_freq_factor"]
    turns_high = found["original_max_position_embeddings"] / found["high_freq_factor"]
    assert turns_low == pytest.approx(context / low, rel=1e-3)
    assert turns_high == pytest.approx(context / high, rel=1e-3)
    assert "rope_freqs.weight" not in source.names()


def test_factors_of_one_are_no_scaling(tmp_path):
    assert GGUFSource(scaled(tmp_path, np.ones(64))).config["rope_scaling"] is None


@pytest.mark.parametrize(
    "factors", [np.arange(1, 65), np.full(64, np.nan), np.zeros(64), np.full(3, 8.0)]
)
def test_other_rope_factors_are_refused(tmp_path, factors):
    with pytest.raises(UnsupportedModel, match="not llama3 scaling"):
        GGUFSource(scaled(tmp_path, factors))


def test_a_sliding_window_makes_it_mistral(tmp_path):
    metadata = {"attention.sliding_window": 64}
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), metadata=metadata)
    config = GGUFSource(path).config
    assert config["model_type"] == "mistral"
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] == 64
    path = write_gguf(tmp_path / "q.gguf", make_tensors(), arch="qwen2", metadata=metadata)
    with pytest.raises(UnsupportedModel, match="sliding window of 64"):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.dimension_count": 8}, "partial rotary embedding"),
        ({"attention.value_length": 8}, "value heads of another size"),
        ({"rope.scaling.type": "su"}, "scales RoPE by 'su'"),
        ({"attention.head_count_kv": [1, 2]}, "differs from layer to layer"),
    ],
)
def test_features_we_do_not_have(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), metadata=metadata)
    with pytest.raises(UnsupportedModel, match=message):
        GGUFSource(path)


def test_unknown_architecture_lists_the_known(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), arch="mamba")
    known = ", ".join(sorted(ARCHITECTURES))
    with pytest.raises(UnsupportedModel, match=rf"architecture 'mamba',.* {known}$"):
        GGUFSource(path)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length"])
def test_missing_or_wrong_metadata(tmp_path, key):
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), remove=(key,))
    with pytest.raises(CorruptFile, match=rf"llama\.{key} is None"):
        GGUFSource(path)
    path = write_gguf(tmp_path / "m.gguf", make_tensors(), metadata={key: "many"})
    with pytest.raises(CorruptFile, match=rf"llama\.{key} is 'many', which is no int"):
        GGUFSource(path)


def test_no_embedding(tmp_path):
    tensors = make_tensors()
    del tensors["token_embd.weight"]
    with pytest.raises(ParameterMismatch, match="no embedding table"):
        GGUFSource(write_gguf(tmp_path / "m.gguf", tensors))


def test_unknown_tensors_keep_their_name(tmp_path):
    tensors = make_tensors() | {"blk.0.attn_sinks.weight": np.zeros(32, np.float32)}
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tensors))
    assert "blk.0.attn_sinks.weight" in source.names()
    with pytest.raises(ParameterMismatch, match="no tensor for missing"):
        source.read("missing")


def test_integers_are_no_weights(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 4), np.int32))
    writer.add_tensor("y", np.full((2, 4), 0.1, np.float64))
    finish(writer)
    file = GGUFFile(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModel, match=r"tensor x .* is I32"):
        file.read("x")
    np.testing.assert_array_equal(file.read("y"), np.full((2, 4), 0.1, np.float32))


@pytest.mark.weights
def test_demo_model(demo_gguf):
    source = GGUFSource(demo_gguf)
    assert len(source.names()) == 272
    assert source.config["vocab_size"] == 49152
    assert source.config["tie_word_embeddings"] is True
    embedding = source.read("model.embed_tokens.weight")
    assert embedding.shape == (49152, 576)
    assert 0.05 < embedding.std() < 0.5
