"""Phi-3-vision against the pixels, rows, logits and greedy tokens of the same put together from
CLIP and Phi-3 of transformers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from image_models import (
    REFERENCES,
    TILED_CASES,
    TILED_IMAGES,
    ImageModels,
    ImageReference,
    data_url,
    load_tiled_reference,
)
from paged_sequence import PagedSequence
from tiny_models import NUM_PAGES, PAGE_SIZE, make_step, relative_error

from mlc_llm.artifact import read_json_object, read_tensor_index
from mlc_llm.errors import CorruptFile, RequestError, UnsupportedModel
from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.reader import ImageReader
from mlc_llm.images.tiles import TileProcessing, arrange, most_rows
from mlc_llm.models.cache_entries import CacheEntries
from mlc_llm.models.registry import find_family
from mlc_llm.runtime.pages import PagePool

pytestmark = pytest.mark.cpu

EXACT = 1e-5
# How many tiles each image of a case's chat has across and down.
GRIDS = {
    "phi3_v": {"strip.png": (3, 1), "high.png": (2, 3)},
    "phi3_v_glb_sub": {"strip.png": (3, 1), "high.png": (2, 2)},
}


def inputs_of(runner: Any) -> ImageInputs:
    inputs = ImageInputs.from_json(runner.metadata.images)
    assert inputs is not None
    return inputs


def rows_of(runner: Any, reference: ImageReference, case: str, image: str) -> Any:
    """Return the rows of an image, each of its views read by a call of its own."""
    inputs = inputs_of(runner)
    order = arrange(inputs.tiling, inputs.num_rows, *GRIDS[case][image])
    views = [runner.embed_image(np.ascontiguousarray(view)) for view in reference.pixels[image]]
    return np.concatenate(views)[order]


def run(runner: Any, reference: ImageReference, sequence: PagedSequence, count: int) -> Any:
    """Return the logits of the next `count` tokens of the reference's chat."""
    first = len(sequence.token_ids)
    tokens = (reference.token_ids + reference.greedy_tokens)[first : first + count]
    rows = np.full(len(tokens), -1, np.int32)
    known = reference.image_rows[first : first + count]
    rows[: len(known)] = known
    embeds = np.concatenate([reference.rows[name] for name in TILED_IMAGES])
    step = make_step([(sequence, tokens)])
    return runner.forward(dataclasses.replace(step, image_rows=rows, image_embeds=embeds)).copy()


def run_prompt(runner: Any, reference: ImageReference, sequence: PagedSequence, chunk: int) -> Any:
    """Return the logits of the reference's prompt, `chunk` tokens a step."""
    length, parts = len(reference.token_ids), []
    while (done := len(sequence.token_ids)) < length:
        parts.append(run(runner, reference, sequence, min(chunk, length - done)))
    return np.concatenate(parts)


def new_sequence() -> PagedSequence:
    return PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))


@pytest.mark.parametrize("name", TILED_CASES)
def test_pixels_equal_the_reference(name: str) -> None:
    reference = load_tiled_reference(name)
    settings = json.loads((REFERENCES / name / "preprocessor_config.json").read_text())
    size = reference.pixels["strip.png"].shape[-1]
    processing = TileProcessing.from_huggingface(settings, settings.get("num_img_tokens", 4), "")
    assert TileProcessing.from_json(json.loads(json.dumps(processing.to_json())), "") == processing
    inputs = ImageInputs(131, size, 11, 32, max_views=7, tiling="sub_glb")
    reader = ImageReader(inputs, processing, "<|image|>")
    for image, (across, down) in GRIDS[name].items():
        found = reader.read(data_url(image), "")
        assert found.shape == (1 + across * down, 3, size, size) and found.dtype == np.float32
        np.testing.assert_allclose(found, reference.pixels[image], atol=5e-6)


@pytest.mark.parametrize("name", TILED_CASES)
def test_rows_of_images_equal_the_reference(image_models: ImageModels, name: str) -> None:
    runner, reference = image_models.image_runner(name), load_tiled_reference(name)
    for image in GRIDS[name]:
        found = rows_of(runner, reference, name, image)
        assert relative_error(found, reference.rows[image]) < EXACT


@pytest.mark.parametrize("name", TILED_CASES)
def test_logits_and_greedy_tokens_equal_the_reference(image_models: ImageModels, name: str) -> None:
    runner, reference = image_models.image_runner(name), load_tiled_reference(name)
    sequence = new_sequence()
    logits = run_prompt(runner, reference, sequence, 128)
    assert relative_error(logits, reference.logits) < EXACT
    found = [int(logits[-1].argmax())]
    while len(found) < len(reference.greedy_tokens):
        assert found == reference.greedy_tokens[: len(found)]
        found.append(int(run(runner, reference, sequence, 1)[-1].argmax()))
    assert found == reference.greedy_tokens
    assert np.array_equal(run_prompt(runner, reference, new_sequence(), 53), logits)


def test_quantized_models_keep_their_tower(image_models: ImageModels) -> None:
    reference = load_tiled_reference("phi3_v")
    index = read_tensor_index(image_models.artifact("phi3_v", "q8f16_1"))
    # MLC LLM's names.
    prefix = "vision_embed_tokens."
    tower = f"{prefix}img_processor.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert index.records[tower].spec.dtype == "float16"
    assert {f"{prefix}sub_GN", f"{prefix}glb_GN"} <= index.records.keys()
    assert f"{prefix}img_projection.linear_1.q_weight" in index.records
    assert {"model.embd.q_weight", "model.h.0.mixer.qkv_proj.q_weight"} <= index.records.keys()
    runner = image_models.image_runner("phi3_v", "q8f16_1")
    found = rows_of(runner, reference, "phi3_v", "high.png")
    assert relative_error(found, reference.rows["high.png"]) < 2e-2
    logits = run_prompt(runner, reference, new_sequence(), 128)
    assert relative_error(logits, reference.logits) < 6e-2


def test_the_library_says_what_it_takes(image_models: ImageModels) -> None:
    metadata = image_models.image_runner("phi3_v").metadata
    inputs = ImageInputs.from_json(metadata.images)
    assert inputs is not None and metadata.memory_usage["embed_image"] > 0
    assert (inputs.token_id, inputs.size, inputs.num_rows, inputs.width) == (131, 24, 11, 32)
    assert (inputs.max_views, inputs.tiling) == (7, "sub_glb")
    assert inputs.size_bytes == 7 * 11 * 32 * 4


def test_an_image_has_most_rows_where_tiles_lie_one_below_the_other() -> None:
    for count in (1, 4, 16):
        lengths = [
            len(arrange("glb_sub", 146, across, down))
            for across in range(1, count + 1)
            for down in range(1, count // across + 1)
        ]
        assert max(lengths) == most_rows(146, count)
    # As published: 144 each, ends of 12 lines each, one between.
    assert len(arrange("sub_glb", 146, 4, 3)) == (4 * 3 + 1) * 144 + 1 + (3 + 1) * 12


def config_of(**changes: Any) -> dict[str, Any]:
    return {**read_json_object(REFERENCES / "phi3_v" / "config.json"), **changes}


def test_artifacts_mean_the_same() -> None:
    settings = read_json_object(REFERENCES / "phi3_v" / "preprocessor_config.json")
    given = config_of(preprocessor_config=settings)
    family = find_family(given)
    config: Any = family.config_from_huggingface(given)
    stored = json.dumps(config.to_json())
    again = family.config_from_json(json.loads(stored))
    assert json.dumps(again.to_json()) == stored
    assert config.image_processing["num_crops"] == 6 and family.name == "phi3_v"


def test_what_is_usual_may_be_left_out() -> None:
    published = config_of(vocab_size=32064)
    for name in ("vision_config", "image_token_index", "img_processor"):
        del published[name]
    config: Any = find_family(published).config_from_huggingface(published)
    assert (config.tower.num_patches, config.num_rows, config.image_token_index) == (
        576,
        144,
        32044,
    )


PREPROCESSOR = "preprocessor_config"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embd_layer": {"projection_cls": "linear"}}, UnsupportedModel, "projection_cls 'linear'"),
        ({"embd_layer": {"use_hd_transform": False}}, UnsupportedModel, "use_hd_transform False"),
        ({"embd_layer": {"with_learnable_separator": False}}, UnsupportedModel, "separator False"),
        ({"embd_layer": {"hd_transform_order": "glb"}}, UnsupportedModel, "hd_transform_order"),
        ({"embd_layer": {"embedding_cls": "audio"}}, UnsupportedModel, "embedding_cls 'audio'"),
        ({"img_processor": {"name": "siglip"}}, UnsupportedModel, "img_processor.name 'siglip'"),
        ({"img_processor": {"layer_idx": -1}}, UnsupportedModel, "img_processor.layer_idx -1"),
        ({"img_processor": {"type_feature": "cls_patch"}}, UnsupportedModel, "'cls_patch'"),
        ({"img_processor": {"image_dim_out": 7}}, CorruptFile, "image_dim_out is 7"),
        ({"img_processor": {"num_img_tokens": 7}}, CorruptFile, "num_img_tokens is 7"),
        ({"img_processor": "clip"}, CorruptFile, "img_processor must be of type dict"),
        ({"vision_config": {"image_size": 30, "patch_size": 6}}, UnsupportedModel, "of two patch"),
        ({"image_token_index": 4000}, CorruptFile, "4000 is outside the vocabulary"),
        ({PREPROCESSOR: {"image_processor_type": "A"}}, UnsupportedModel, "image_processor_type A"),
        ({PREPROCESSOR: {"num_crops": 0}}, CorruptFile, "num_crops must be from 1 to 64, is 0"),
        ({PREPROCESSOR: {"num_crops": "4"}}, CorruptFile, "num_crops must be from 1 to 64"),
        ({PREPROCESSOR: {"num_img_tokens": 8}}, CorruptFile, "num_img_tokens is 8"),
        ({PREPROCESSOR: {"do_convert_rgb": False}}, UnsupportedModel, "do_convert_rgb must be"),
        ({PREPROCESSOR: {"image_std": [1, 1, 0]}}, CorruptFile, "those of image_std above 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = config_of(**changes)
    with pytest.raises(error, match=message):
        find_family(config).config_from_huggingface(config)


def test_libraries_for_browsers_are_refused() -> None:
    family = find_family(config_of())
    model = family.build(family.config_from_huggingface(config_of()), "float32")
    with pytest.raises(UnsupportedModel, match="it takes images, and libraries for others take"):
        CacheEntries(model)


def test_images_that_are_too_thin_are_refused() -> None:
    with pytest.raises(RequestError, match="9000 x 2 pixels is too long for its width"):
        TileProcessing().grid(9000, 2, 336)
    assert TileProcessing().grid(2, 3, 336) == TileProcessing().grid(200, 300, 336)
