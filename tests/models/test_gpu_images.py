"""Images on a GPU: rows and logits that transformers computed, and answers to them."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import numpy as np
import pytest
from gpu_device import find_gpu
from image_models import (
    CHAT_IMAGES,
    IMAGE_TOKEN_ID,
    IMAGES,
    ImageModels,
    load_reference,
    load_tiled_reference,
)
from paged_sequence import PagedSequence
from tiny_models import NUM_PAGES, PAGE_SIZE, make_step, relative_error

from mlc_llm.images.inputs import ImageInputs
from mlc_llm.images.tiles import arrange
from mlc_llm.runtime.pages import PagePool

pytestmark = pytest.mark.cpu


def test_a_chat_about_images_equals_the_reference(image_models: ImageModels) -> None:
    reference = load_reference("llava")
    with closing(image_models.gpu_runner("llava", "q0f32", find_gpu())) as runner:
        rows = {image: runner.embed_image(reference.pixels[image]) for image in IMAGES}
        for image in IMAGES:
            assert relative_error(rows[image], reference.rows[image]) < 1e-5
        sequence = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        step = dataclasses.replace(
            make_step([(sequence, reference.token_ids)]),
            image_rows=reference.image_rows,
            image_embeds=np.concatenate([rows[image] for image in CHAT_IMAGES]),
        )
        logits = runner.forward(step)
        assert relative_error(logits, reference.logits) < 1e-5
        found = [int(logits[-1].argmax())]
        # Steps of one token of text, which have an entry of their own.
        while len(found) < len(reference.greedy_tokens):
            step = make_step([(sequence, found[-1:])])
            found.append(int(runner.forward(step)[-1].argmax()))
        assert found == reference.greedy_tokens
        other = PagedSequence(PagePool(NUM_PAGES, PAGE_SIZE))
        text = [token for token in reference.token_ids if token != IMAGE_TOKEN_ID][:5]
        alone = runner.forward(make_step([(other, text)])).copy()
        other.truncate(0)
        step = dataclasses.replace(
            make_step([(other, text)]),
            image_rows=np.full(len(text), -1, np.int32),
            image_embeds=reference.rows["wide.png"],
        )
        assert np.array_equal(runner.forward(step), alone)


def test_rows_of_tiles_equal_the_reference(image_models: ImageModels) -> None:
    reference = load_tiled_reference("phi3_v")
    with closing(image_models.gpu_runner("phi3_v", "q0f32", find_gpu())) as runner:
        inputs = ImageInputs.from_json(runner.metadata.images)
        assert inputs is not None
        views = [runner.embed_image(view) for view in reference.pixels["high.png"]]
        found = np.concatenate(views)[arrange(inputs.tiling, inputs.num_rows, 2, 3)]
        assert relative_error(found, reference.rows["high.png"]) < 1e-5
