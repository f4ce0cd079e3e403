"""LoRA adapters merged into checkpoints, and everything in them that cannot be merged."""

import json
import math

import numpy as np
import pytest
from damage import count_refusals, damaged_copies
from make_gguf import make_tensors, write_gguf
from make_lora import make_pair, pair_of, write_adapter
from safetensors.numpy import save_file
from test_torch_file import write_archive

from mlc_llm.errors import CorruptFile, ModelNotFound, ParameterMismatch, UnsupportedModel
from mlc_llm.weights.open import open_source

Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def base(tmp_path, rng):
    """Return the tensors of a checkpoint in tmp_path / "base"."""
    shapes = {f"{Q}.weight": (6, 10), f"{EMBED}.weight": (12, 10), "lm_head.weight": (12, 10)}
    shapes |= {"model.norm.weight": (10,), f"{Q}.bias": (6,)}
    tensors = {name: rng.standard_normal(s).astype(np.float16) for name, s in shapes.items()}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tensors


@pytest.fixture
def merge(tmp_path, base):
    """Write an adapter and return the checkpoint with it."""

    def write_and_open(tensors, **config):
        adapter = write_adapter(tmp_path / "adapter", tensors, **config)
        return open_source(tmp_path / "base", lora_adapter=adapter)

    return write_and_open


def check(source, base, changed):
    assert sorted(source.names()) == sorted(base)
    for name, tensor in base.items():
        expected = changed.get(name, tensor)
        assert source.shape(name) == tensor.shape
        found = source.read(name)
        if name in changed:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 2.0),
        ({"lora_alpha": 16.0}, 4.0),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"self_attn.q_proj": 1}}, 0.25),
        ({"r": 64, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"alpha_pattern": {"k_proj": 1}, "init_lora_weights": True, "lora_dropout": 0.1}, 2.0),
    ],
)
def test_linear(merge, base, rng, settings, scaling):
    down, up = make_pair(rng, 6, 10)
    source = merge(pair_of(Q, down, up), **settings)
    expected = base[f"{Q}.weight"].astype(np.float32) + scaling * (up @ down)
    check(source, base, {f"{Q}.weight": expected})
    names = {path.name for path in source.files()}
    assert names == {"model.safetensors", "adapter_config.json", "adapter_model.safetensors"}


def test_weights_stored_by_inputs(merge, base, rng):
    down, up = make_pair(rng, 10, 6)
    source = merge(pair_of(Q, down, up), fan_in_fan_out=True)
    expected = base[f"{Q}.weight"].astype(np.float32) + 2 * (up @ down).T
    check(source, base, {f"{Q}.weight": expected})


def test_embedding_and_whole_modules(merge, base, rng):
    down = rng.standard_normal((4, 12)).astype(np.float32)
    up = rng.standard_normal((10, 4)).astype(np.float32)
    head = rng.standard_normal((12, 10)).astype(np.float32)
    norm = np.ones(10, np.float32)
    tensors = {
        f"base_model.model.{EMBED}.lora_embedding_A": down,
        f"base_model.model.{EMBED}.lora_embedding_B": up,
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.norm.modules_to_save.default.weight": norm,
    }
    source = merge(tensors, modules_to_save=["lm_head", "norm"])
    embedding = base[f"{EMBED}.weight"].astype(np.float32) + 2 * (up @ down).T
    changed = {f"{EMBED}.weight": embedding, "lm_head.weight": head, "model.norm.weight": norm}
    check(source, base, changed)


def test_pytorch_adapters(tmp_path, base, rng):
    down, up = make_pair(rng, 6, 10)
    adapter = write_adapter(tmp_path / "adapter", {})
    (adapter / "adapter_model.safetensors").unlink()
    write_archive(adapter / "adapter_model.bin", pair_of(Q, down, up))
    source = open_source(tmp_path / "base", lora_adapter=adapter)
    expected = base[f"{Q}.weight"].astype(np.float32) + 2 * (up @ down)
    check(source, base, {f"{Q}.weight": expected})


def test_gguf_under_an_adapter(tmp_path, rng):
    path = write_gguf(tmp_path / "m.gguf", make_tensors())
    before = open_source(path).read(f"{Q}.weight")
    down, up = make_pair(rng, *before.shape)
    adapter = write_adapter(tmp_path / "adapter", pair_of(Q, down, up))
    found = open_source(path, lora_adapter=adapter).read(f"{Q}.weight")
    np.testing.assert_allclose(found, before + 2 * (up @ down), rtol=1e-5, atol=1e-5)


def test_names_without_the_base_models_prefix(tmp_path, rng):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    before = {"h.0.attn.c_attn.weight": np.zeros((10, 6), np.float32)}
    save_file(before, tmp_path / "base" / "model.safetensors")
    down, up = make_pair(rng, 6, 10)
    tensors = pair_of("transformer.h.0.attn.c_attn", down, up)
    adapter = write_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True)
    found = open_source(tmp_path / "base", lora_adapter=adapter).read("h.0.attn.c_attn.weight")
    np.testing.assert_allclose(found, 2 * (up @ down).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.other.lora_A.weight": np.ones((4, 10))}, "other.lora_A.weight; is it"),
        ({f"base_model.model.{Q}.lora_A.weight": np.ones((4, 10))}, f"{Q}.weight; is it an"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(6)}, "lora_magnitude_vector"),
        ({"base_model.model.lm_head.weight": np.ones((12, 10))}, "lm_head.weight; is it"),
        (pair_of(Q, np.ones((4, 9)), np.ones((6, 4))), r"shape \[6, 9\], it has \[6, 10\]"),
        (pair_of(Q, np.ones((4, 10)), np.ones((6, 3))), r"B \[6, 3\] of .* do not fit"),
        (pair_of(Q, np.ones((3, 10)), np.ones((6, 3))), "has rank 3, .* says 4"),
        (pair_of(Q, np.ones(4), np.ones((6, 4))), "do not fit"),
    ],
)
def test_tensors_that_fit_nothing_are_named(merge, tensors, message):
    with pytest.raises(ParameterMismatch, match=message):
        merge({name: tensor.astype(np.float32) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"peft_type": "LOHA"}, UnsupportedModel, "adapters of type 'LOHA'"),
        ({"use_dora": True}, UnsupportedModel, "use_dora is not supported"),
        ({"layer_replication": [[0, 1]]}, UnsupportedModel, "layer_replication is not"),
        ({"bias": "all"}, UnsupportedModel, "bias 'all' is not supported"),
        ({"rank_pattern": {"(a+)+$": 3}}, UnsupportedModel, "is no name of a module"),
        ({"lora_alpha": "x"}, CorruptFile, "lora_alpha is 'x'"),
        ({"lora_alpha": True}, CorruptFile, "lora_alpha is True"),
        ({"lora_alpha": -1}, CorruptFile, "lora_alpha is -1"),
        ({"rank_pattern": [1]}, CorruptFile, "rank_pattern is"),
        ({"use_rslora": "yes"}, CorruptFile, "use_rslora is 'yes'"),
        ({"modules_to_save": "lm_head"}, CorruptFile, "modules_to_save is 'lm_head'"),
    ],
)
def test_settings_that_are_not_supported(merge, rng, settings, error, message):
    tensors = pair_of(Q, *make_pair(rng, 6, 10))
    if "modules_to_save" in settings:
        tensors["base_model.model.lm_head.weight"] = np.ones((12, 10), np.float32)
    with pytest.raises(error, match=message):
        merge(tensors, **settings)


@pytest.mark.parametrize("name", ["lm_head.weight", f"{EMBED}.weight"])
def test_tied_embeddings_are_refused(tmp_path, merge, rng, name):
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    pair = pair_of(name.removesuffix(".weight"), *make_pair(rng, 12, 10))
    with pytest.raises(UnsupportedModel, match=f"changes {name}, which the model uses for input"):
        merge(pair)


def test_integers_are_no_adapter(merge):
    pair = pair_of(Q, np.ones((4, 10), np.int32), np.ones((6, 4), np.int32))
    with pytest.raises(UnsupportedModel, match=r"lora_A\.weight in .* is int32"):
        merge(pair)


def test_directories_that_hold_none(tmp_path, base):
    with pytest.raises(ModelNotFound, match=r"has no adapter_config\.json"):
        open_source(tmp_path / "base", lora_adapter=tmp_path)
    adapter = write_adapter(tmp_path / "adapter", {})
    with pytest.raises(CorruptFile, match="has no tensors"):
        open_source(tmp_path / "base", lora_adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_model\.safetensors or adapter_model\.bin"):
        open_source(tmp_path / "base", lora_adapter=adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damage_anywhere_raises_only_our_errors(tmp_path, base, rng, name):
    adapter = write_adapter(tmp_path / "adapter", pair_of(Q, *make_pair(rng, 6, 10)))
    whole = (adapter / name).read_bytes()

    def use(content):
        (adapter / name).write_bytes(content)
        source = open_source(tmp_path / "base", lora_adapter=adapter)
        assert source.read(f"{Q}.weight").shape == (6, 10)

    reach = 300 if name.endswith("safetensors") else None
    assert count_refusals(damaged_copies(whole, 41, 240, reach), use) > 60
