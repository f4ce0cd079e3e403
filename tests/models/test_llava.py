"""LLaVA against the rows, logits and greedy tokens that transformers computed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_models import (
    CASES,
    CHAT_IMAGES,
    IMAGES,
    REFERENCES,
    ImageModels,
    ImageReference,
    load_reference,
)
from paged_sequence import PagedSequence
from tiny_models import NUM_PAGES, PAGE_SIZE, make_step, relative_error

from mlc_llm.artifact import read_json_object, read_tensor_index
from mlc_llm.compiler.compile import CompiledModel
from mlc_llm.errors import CorruptFile, UnsupportedModel
from mlc_llm.models.registry import find_family
from mlc_llm.prepare.original import read_model
from mlc_llm.runtime.pages import PagePool

pytestmark = pytest.mark.cpu

PROMISED, MEASURED = 1e-4, 1e-5


def run(
    runner: Any, reference: ImageReference, sequence: PagedSequence, count: int
) -> np.ndarray[Any, Any]:
    """Return the logits of the next `count` tokens of the reference's chat."""
    first = len(sequence.token_ids)
    tokens = (reference.token_ids + reference.greedy_tokens)[first : first + count]
    rows = np.full(len(tokens), -1, np.int32)
    known = reference.image_rows[first : first + count]
    rows[: len(known)] = known
    embeds = np.concatenate([runner.embed_image(reference.pixels[name]) for name in CHAT_IMAGES])
    step = dataclasses.replace(
        make_step([(sequence, tokens)]), image_rows=rows, image_embeds=embeds
    )
    return runner.forward(step).copy()


def new_sequence() -> PagedSequence:
    return PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))


@pytest.mark.parametrize("name", CASES)
def test_rows_of_images_equal_the_reference(image_models: ImageModels, name: str) -> None:
    runner, reference = image_models.image_runner(name), load_reference(name)
    for image in IMAGES:
        found = runner.embed_image(reference.pixels[image])
        assert relative_error(found, reference.rows[image]) < MEASURED
    again = runner.embed_image(reference.pixels["square.png"])
    assert np.array_equal(again, runner.embed_image(reference.pixels["square.png"]))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(image_models: ImageModels, name: str) -> None:
    runner, reference = image_models.image_runner(name), load_reference(name)
    whole = run(runner, reference, new_sequence(), len(reference.token_ids))
    assert relative_error(whole, reference.logits) < PROMISED
    assert relative_error(whole, reference.logits) < MEASURED
    sequence = new_sequence()
    parts = [run(runner, reference, sequence, 7) for _ in range(0, len(whole), 7)]
    assert np.array_equal(np.concatenate(parts)[: len(whole)], whole)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_reference(image_models: ImageModels, name: str) -> None:
    runner, reference = image_models.image_runner(name), load_reference(name)
    sequence = new_sequence()
    logits = run(runner, reference, sequence, len(reference.token_ids))
    found = [int(logits[-1].argmax())]
    while len(found) < len(reference.greedy_tokens):
        assert found == reference.greedy_tokens[: len(found)]
        found.append(int(run(runner, reference, sequence, 1)[-1].argmax()))
    assert found == reference.greedy_tokens


def test_images_change_nothing_for_others(image_models: ImageModels) -> None:
    """A text beside a chat with images, and alone without any: the same to the bit."""
    runner, reference = image_models.image_runner("llava"), load_reference("llava")
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    text = [token for token in reference.token_ids if token != 131]
    alone = runner.forward(make_step([(PagedSequence(pool), text)])).copy()
    step = make_step([(PagedSequence(pool), text), (PagedSequence(pool), reference.token_ids)])
    rows = np.concatenate([np.full(len(text), -1, np.int32), reference.image_rows])
    embeds = np.concatenate([runner.embed_image(reference.pixels[name]) for name in CHAT_IMAGES])
    both = runner.forward(dataclasses.replace(step, image_rows=rows, image_embeds=embeds))
    assert np.array_equal(both[: len(text)], alone)
    assert relative_error(both[len(text) :], reference.logits) < MEASURED


def test_quantized_models_keep_their_tower(image_models: ImageModels) -> None:
    reference = load_reference("llava")
    index = read_tensor_index(image_models.artifact("llava", "q8f16_1"))
    towers = {name: r.spec.dtype for name, r in index.records.items() if "vision_tower" in name}
    assert len(towers) == 55 and set(towers.values()) == {"float16"}
    assert "multi_modal_projector.linear_1.q_weight" in index.records
    assert "language_model.lm_head.q_weight" in index.records
    runner = image_models.image_runner("llava", "q8f16_1")
    for image in IMAGES:
        found = runner.embed_image(reference.pixels[image])
        assert relative_error(found, reference.rows[image]) < 2e-2
    logits = run(runner, reference, new_sequence(), len(reference.token_ids))
    assert relative_error(logits, reference.logits) < 6e-2


def test_the_library_says_what_it_takes(image_models: ImageModels) -> None:
    metadata = image_models.image_runner("llava").metadata
    usage, images = metadata.memory_usage, metadata.images
    assert set(usage) == {"forward", "embed_image", "pack_params"} and usage["embed_image"] > 0
    plan = CompiledModel(metadata, None, ("forward",), "embed_image").memory_plan()
    assert "reading an image" in plan
    sizes = {"token_id": 131, "size": 30, "num_rows": 9, "width": 32, "num_packed": 41}
    assert images == {**sizes, "max_views": 1, "tiling": ""}
    with pytest.raises(UnsupportedModel, match="make no embeddings"):
        image_models.compile("llava", model_task="embedding")


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**read_json_object(REFERENCES / name / "config.json"), **changes}


@pytest.mark.parametrize("name", CASES)
def test_artifacts_mean_the_same(name: str) -> None:
    family = find_family(config_of(name))
    config = family.config_from_huggingface(config_of(name))
    assert family.config_from_json(config.to_json()) == config
    # MLC LLM keeps the language model's fields apart, with -1 for limits beside them.
    flat = config.to_json()
    own = ("vision_config", "image_token_index", "vision_feature_layer", "projector_hidden_act")
    kept = {key: flat[key] for key in (*own, "vision_feature_select_strategy", "text_config")}
    kept["multimodal_projector_bias"] = flat["multimodal_projector_bias"]
    limits = {"context_window_size": -1, "sliding_window_size": -1, "prefill_chunk_size": -1}
    assert family.config_from_json({**kept, **limits, "vocab_size": 136}) == config


def test_what_is_usual_may_be_left_out() -> None:
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 14},
    }
    family = find_family(published)
    config: Any = family.config_from_huggingface(published)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        4096,
        32,
        32064,
    )
    assert config.tower.num_patches == 576 and config.num_tower_layers == 23
    assert config.context_window_size == 4096 and config.image_token_index == 32000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_config": {"model_type": "qwen2"}}, UnsupportedModel, "type 'qwen2' is not"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, UnsupportedModel, "'siglip_vis"),
        ({"vision_config": {"model_type": "pixtral"}}, UnsupportedModel, "tower 'pixtral'"),
        ({"vision_feature_layer": [-2, -5]}, UnsupportedModel, "must be one layer"),
        ({"vision_feature_layer": -9}, CorruptFile, "the tower has 3 layers"),
        ({"vision_feature_select_strategy": "some"}, UnsupportedModel, "strategy 'some'"),
        ({"projector_hidden_act": "tanhshrink"}, UnsupportedModel, "'tanhshrink' is not"),
        ({"image_token_index": 4000}, CorruptFile, "4000 is outside the vocabulary"),
        ({"image_token_index": "a"}, CorruptFile, "image_token_index must be of type int"),
        ({"vision_config": {"patch_size": 0, "image_size": 30}}, CorruptFile, "patch_size must be"),
        ({"vision_config": {"patch_size": 40, "image_size": 30}}, CorruptFile, "is more than"),
        ({"vision_config": {"num_attention_heads": 5}}, UnsupportedModel, "is no multiple of"),
        ({"vision_config": {"hidden_act": "prelu"}}, UnsupportedModel, "activation 'prelu'"),
        ({"vision_config": {"num_channels": 1}}, UnsupportedModel, "images of 1 channels"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = config_of("llava", **changes)
    with pytest.raises(error, match=message):
        find_family(config).config_from_huggingface(config)


def test_its_successor_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="LlavaNextForConditionalGeneration is not supp"):
        find_family({"architectures": ["LlavaNextForConditionalGeneration"]})


def test_settings_of_images_come_from_either_file(tmp_path: Path) -> None:
    settings = read_json_object(REFERENCES / "llava" / "preprocessor_config.json")
    (tmp_path / "config.json").write_text(json.dumps(config_of("llava")))
    _, without = read_model(tmp_path)
    assert without.to_json()["image_processing"] is None
    whole = {"image_token": "<image>", "image_processor": {**settings, "resample": 2}}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    _, new = read_model(tmp_path)
    assert new.to_json()["image_processing"]["resample"] == 2
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    _, old = read_model(tmp_path)
    assert old.to_json()["image_processing"]["resample"] == 3
