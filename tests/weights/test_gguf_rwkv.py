"""RWKV-6 in GGUF files is the model it was made of."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_cases import converted
from reference_cases import get_case

from mlc_llm.errors import CorruptFile
from mlc_llm.weights.gguf import GGUFSource
from mlc_llm.weights.open import open_source


def write_rwkv(path, source, rescale_every=0, head_size=16):
    """Write a checkpoint as llama.cpp's converter does; names come from the gguf package."""
    config = source.config
    layers = config["num_hidden_layers"]
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.RWKV6, layers)
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.add_context_length(1048576)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rescale_every_n_layers(rescale_every)
    writer.add_wkv_head_size(head_size)
    writer.add_time_mix_extra_dim(32)
    writer.add_time_decay_extra_dim(64)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(0)
    fused = {}
    for name in source.names():
        tensor = np.asarray(source.read(name))
        stored = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if not stored.endswith((".weight", ".bias")):
            stored += ".weight"
        kind = stored.removesuffix(".weight").partition("time_mix_")[2]
        layer = int(stored.split(".")[1]) if stored.startswith("blk.") else 0
        if kind in ("w1", "decay_w1", "decay_w2"):
            tensor = tensor.transpose()
        elif kind == "w2":
            tensor = tensor.transpose(0, 2, 1)
        elif kind == "decay" or "_lerp_" in stored:
            tensor = tensor.squeeze()
        if rescale_every and stored.endswith(
            ("time_mix_output.weight", "channel_mix_value.weight")
        ):
            tensor = tensor / np.float32(2 ** (layer // rescale_every))
        if kind.startswith("lerp_") and kind != "lerp_x":
            fused[layer, kind[-1]] = tensor
        else:
            writer.add_tensor(stored, np.ascontiguousarray(tensor))
    for layer in range(layers):
        parts = np.stack([fused[layer, letter] for letter in "wkvrg"])
        writer.add_tensor(f"blk.{layer}.time_mix_lerp_fused.weight", parts[:, None, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("rescale_every", [0, 1])
def test_a_reference_as_gguf_is_the_same_model(tmp_path: Path, rescale_every):
    source = open_source(get_case("rwkv6").directory)
    source.config["rescale_every"] = rescale_every
    path = write_rwkv(tmp_path / "m.gguf", source, rescale_every)
    _, expected, weights = converted(source, tmp_path / "original")
    family, config, found = converted(open_source(path), tmp_path / "gguf")
    assert family.name == "rwkv6" and config.is_rescaled
    assert {**config.to_json(), "is_rescaled": False} == expected.to_json()
    assert found == weights


def test_stacked_parts_of_another_number(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write_rwkv(path, open_source(get_case("rwkv6").directory))
    reader = gguf.GGUFReader(path, "r+")
    fused = next(tensor for tensor in reader.tensors if "lerp_fused" in tensor.name)
    fused.field.parts[3][:] = (32, 1, 5, 1)
    reader.data.flush()
    with pytest.raises(
        CorruptFile, match=r"has parts blk\.0\.time_mix_lerp_fused.*\[1, 5, 1, 32\]"
    ):
        GGUFSource(path)


def test_heads_larger_than_the_model(tmp_path: Path):
    path = write_rwkv(tmp_path / "m.gguf", open_source(get_case("rwkv6").directory), head_size=64)
    with pytest.raises(CorruptFile, match="0 heads of 32 values make no model"):
        GGUFSource(path)
