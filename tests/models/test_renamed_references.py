"""Families that are others under names of their own become the same artifacts, bit by bit.

The stored references prove the others; `tests/references/renamed.json` says which. Here their
checkpoints are written anew, with the configuration and the tensor names of these.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_model import read_weights
from reference_cases import REFERENCES
from safetensors.numpy import save_file

from mlc_llm.artifact import read_chat_config, read_tensor_index
from mlc_llm.models.registry import get_family
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import convert_weights, write_chat_config_for

RENAMED = json.loads((REFERENCES / "renamed.json").read_text())
DIRECTORIES = {"chat": REFERENCES, "embedding": REFERENCES.parent / "encoder_references"}

Config = dict[str, Any]
Weights = Mapping[str, NDArray[Any]]
Checkpoint = tuple[Config, dict[str, NDArray[Any]]]


def as_bge(config: Config, weights: Weights) -> Checkpoint:
    """With the prefix, as MLC LLM wants it of checkpoints that it calls so."""
    assert all(name.startswith(("bert.", "cls.")) for name in weights)
    return config, dict(weights)


def as_phi_msft(config: Config, weights: Weights) -> Checkpoint:
    """As Microsoft's own code saved it, under the class name that transformers has too."""
    named = {
        "lm_head.": "lm_head.linear.",
        "model.final_layernorm.": "lm_head.ln.",
        "model.embed_tokens.": "transformer.embd.wte.",
        "model.layers.": "transformer.h.",
        ".input_layernorm.": ".ln.",
        ".self_attn.dense.": ".mixer.out_proj.",
    }
    found: dict[str, NDArray[Any]] = {}
    for name, value in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = np.concatenate([weights[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("self_attn.q_proj", "mixer.Wqkv")
        for theirs, first in named.items():
            name = name.replace(theirs, first)
        found[name] = value
    heads, share = config["num_attention_heads"], config["rope_parameters"]["partial_rotary_factor"]
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi-msft",
        "activation_function": config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "n_embd": config["hidden_size"],
        "n_head": heads,
        "n_head_kv": None,
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "rotary_dim": int(share * config["hidden_size"] // heads),
        "tie_word_embeddings": False,
        "vocab_size": config["vocab_size"],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
    }, found


def as_part_of_a_model_with_images(config: Config, weights: Weights) -> Checkpoint:
    """The text model beside one of images and layers that predict several tokens."""
    found = {
        name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()
    }
    unused = {"model.visual.patch_embed.proj.weight": (8, 3, 2, 4, 4), "mtp.fc.weight": (32, 64)}
    found |= {name: np.ones(shape, np.float32) for name, shape in unused.items()}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": config,
        "vision_config": {"model_type": "qwen3_5", "hidden_size": 8, "depth": 1},
        "image_token_id": 130,
        "tie_word_embeddings": False,
    }, found


def as_moe_with_images(config: Config, weights: Weights) -> Checkpoint:
    """The same of a mixture of experts, whose experts are stacked."""
    experts = range(config["num_experts"])
    found = {name: value for name, value in weights.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([weights[f"{at}{expert}.{part}_proj.weight"] for expert in experts])
            for part in ("gate", "up", "down")
        )
        found |= {f"{at}gate_up_proj": np.concatenate([gate, up], axis=1), f"{at}down_proj": down}
    config, found = as_part_of_a_model_with_images(config, found)
    names = ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe")
    return {**config, "architectures": [names[0]], "model_type": names[1]}, found


WRITERS: dict[str, Callable[[Config, Weights], Checkpoint]] = {
    "bert-bge": as_bge,
    "phi-msft": as_phi_msft,
    "qwen3_5": as_part_of_a_model_with_images,
    "qwen3_5_moe": as_moe_with_images,
}


def convert(source: Path, output: Path, model_type: str = "auto") -> Path:
    options: Any = {"quantization": "q0f32", "model_type": model_type}
    write_chat_config_for(source, output, **options)
    convert_weights(source, output, **options, progress=NullProgress())
    return output


def test_every_renamed_family_is_written_here() -> None:
    assert sorted(WRITERS) == sorted(RENAMED)


@pytest.mark.parametrize("name", WRITERS)
def test_the_artifact_is_that_of_the_reference(name: str, tmp_path: Path) -> None:
    original = DIRECTORIES[RENAMED[name]["task"]] / RENAMED[name]["case"]
    config = json.loads((original / "config.json").read_text())
    renamed, weights = WRITERS[name](config, read_weights(original))
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.safetensors", "config.json", "reference.npz")
    shutil.copytree(original, source, ignore=ignored)
    (source / "config.json").write_text(json.dumps(renamed))
    save_file(weights, source / "model.safetensors")
    # Nothing in a checkpoint tells BGE from BERT; MLC LLM's users name it.
    model_type = name if name == "bert-bge" else "auto"
    found = convert(source, tmp_path / "found", model_type)
    expected = convert(original, tmp_path / "expected")

    ours, theirs = read_tensor_index(found), read_tensor_index(expected)
    assert sorted(ours.records) == sorted(theirs.records)
    for tensor in theirs.records:
        np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor))
    configs = [read_chat_config(path) for path in (found, expected)]
    assert configs[0].model_type == name
    assert configs[0].embedding_metadata == configs[1].embedding_metadata
    families = [get_family(config.model_type) for config in configs]
    assert families[0].build is families[1].build
    fields = [
        dataclasses.asdict(family.config_from_json(config.model_config))
        for family, config in zip(families, configs, strict=True)
    ]
    for values in fields:
        values.pop("tensor_prefix", None)  # of the checkpoint
    assert fields[0] == fields[1]
