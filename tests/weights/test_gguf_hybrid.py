"""Qwen3.5 and Qwen3-Next in GGUF files: what the references of test_gguf_families.py have not."""

import gguf
import numpy as np
import pytest
from gguf_cases import converted
from gguf_hybrid_cases import hybrid_metadata, store_hybrid, store_next
from make_gguf import FFN, HIDDEN, VOCAB, write_gguf
from reference_cases import get_case

from mlc_llm.errors import CorruptFile
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.formats import OTHER_ENCODING
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.open import open_source

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
    # Others that nobody spoke of are not.
    path, _ = write(tmp_path / "o.gguf", metadata={"block_count": 1}, tensors=further)
    assert "model.layers.1.mlp.up_proj.weight" in GGUFSource(path).names()
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


class WithExpertsEverywhere:
    """The reference of Qwen3-Next, whose second layer has the experts of the first one.

    GGUF has no place for layers without experts, and no published model has some.
    """

    def __init__(self):
        self._source = open_source(get_case("qwen3_next").directory)
        self.config = {**self._source.config, "mlp_only_layers": []}

    def names(self):
        found = [name for name in self._source.names() if "layers.1.mlp." not in name]
        first = [name for name in found if "layers.0.mlp." in name]
        return found + [name.replace("layers.0.", "layers.1.") for name in first]

    def read(self, name):
        return self._source.read(name.replace("layers.1.mlp.", "layers.0.mlp."))

    def shape(self, name):
        return self.read(name).shape

    def files(self):
        return self._source.files()


def write_next(path, source, is_old):
    """Write Qwen3-Next; old converters left the inputs of linear attention as they are."""
    config = source.config
    count = config["num_hidden_layers"]
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, count)
    tensors, stacks = {}, {}
    for name in source.names():
        whole = np.asarray(source.read(name))
        keeps = is_old and "qkvz" in name
        for part, tensor in [(name, whole)] if keeps else store_next(name, whole, config):
            if part.endswith("norm.weight") and not part.endswith("linear_attn.norm.weight"):
                tensor = tensor + np.float32(1)
            if ".experts." in part:
                before, _, after = part.partition(".experts.")
                expert, _, leaf = after.partition(".")
                stacks.setdefault(f"{before}.experts.{leaf}", {})[int(expert)] = tensor
            else:
                renamed = part.replace("dt_bias", "dt_proj.bias")
                tensors[mapping.get_name(renamed, try_suffixes=(".weight", ".bias"))] = tensor
    for name, parts in stacks.items():
        stacked = np.stack([parts[expert] for expert in range(len(parts))])
        tensors[mapping.get_name(name, try_suffixes=(".weight",))] = stacked
    for name in [name for name in tensors if "ffn_gate_inp_shexp" in name]:
        tensors[name] = tensors[name][0]
    metadata = {
        **hybrid_metadata({**config, "layer_types": ["linear_attention", "full_attention"]}),
        "block_count": count,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": int(config["head_dim"] * config["partial_rotary_factor"]),
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }
    return write_gguf(path, tensors, arch="qwen3next", metadata=metadata)


@pytest.mark.parametrize("is_old", [False, True])
def test_qwen3_next_is_the_same_model(tmp_path, is_old):
    source = WithExpertsEverywhere()
    path = write_next(tmp_path / "m.gguf", source, is_old)
    _, expected, weights = converted(source, tmp_path / "original")
    family, config, found = converted(open_source(path), tmp_path / "gguf")
    assert family.name == "qwen3_next" and config.has_split_qkvz is not is_old
    assert {**config.to_json(), "has_split_qkvz": False} == expected.to_json()
    arrays = (np.frombuffer(content, np.float32) for content in (found, weights))
    np.testing.assert_allclose(*arrays, rtol=1e-6, atol=1e-6)


def test_qwen35moe_does_not_say_the_width_of_other_layers(tmp_path):
    metadata = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
    metadata |= {"expert_shared_feed_forward_length": 8, **hybrid_metadata(linear_config(8))}
    tensors = {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    remove = ("feed_forward_length",)
    path = tmp_path / "m.gguf"
    write_gguf(path, tensors, arch="qwen35moe", metadata=metadata, remove=remove)
    content = GGUFSource(path).config
    config = find_family(content).config_from_huggingface(content)
    assert (config.intermediate_size, config.shared_expert_intermediate_size) == (24, 8)
