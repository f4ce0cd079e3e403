"""LLaVA against the rows, logits and greedy tokens that transformers computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from image_models import CASES, CHAT_IMAGES, IMAGES, ImageModels, ImageReference, load_reference
from paged_sequence import PagedSequence
from tiny_models import NUM_PAGES, PAGE_SIZE, make_step, relative_error

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
