"""Chats about images that a tiny Phi-3-vision sees in tiles: the Python engine and HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from image_models import TILED_CASES, TILED_IMAGES, ImageModels, load_tiled_reference
from seeing import GREEDY, client_of, open_case, part, served_as, text

from mlc_llm.api import MLCEngine
from mlc_llm.engine.config import EngineConfig
from mlc_llm.engine.open import OpenModel, open_model
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import LibraryMismatch
from mlc_llm.serve.catalog import ServedModels

pytestmark = pytest.mark.cpu

# The reference's chat: a wide image and a high one, of different numbers of tiles.
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "See."},
    {"role": "user", "content": [part("strip.png"), text("what?"), part("high.png")]},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": [text("and"), part("strip.png")]},
]


@pytest.mark.parametrize("name", TILED_CASES)
def test_prompt_and_its_logits_equal_the_reference(image_models: ImageModels, name: str) -> None:
    """From messages to log-probabilities at every place of the prompt."""
    reference = load_tiled_reference(name)
    opened = open_case(image_models, name)
    prompt = opened.prompts.build(MESSAGES)
    assert prompt.token_ids == reference.token_ids
    for image, known in zip(prompt.images, TILED_IMAGES, strict=True):
        assert image.num_rows == len(reference.rows[known])
        np.testing.assert_allclose(image.pixels, reference.pixels[known], atol=5e-6)
    params = SamplingParams(temperature=0, max_tokens=20)
    request = Request("a", prompt.token_ids, params, prompt_logprobs=0, images=prompt.images)
    opened.engine.add(request)
    outputs = []
    while opened.engine.has_work:
        outputs += opened.engine.step()
    assert [output.token_id for output in outputs] == reference.greedy_tokens
    logits = reference.logits[:, : opened.engine.vocab_size].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = outputs[0].prompt_logprobs
    assert found is not None and len(found) == len(prompt.token_ids)
    for place, entry in enumerate(found[1:], 1):
        assert entry is not None and entry.token_id == prompt.token_ids[place]
        assert entry.logprob == pytest.approx(logprobs[place - 1, entry.token_id], abs=1e-3)
    opened.close()


def test_a_library_for_fewer_tiles_is_refused(image_models: ImageModels, tmp_path: Path) -> None:
    artifact = tmp_path / "model"
    shutil.copytree(image_models.artifact("phi3_v"), artifact)
    path = artifact / "mlc-chat-config.json"
    config = json.loads(path.read_text())
    config["model_config"]["image_processing"]["num_crops"] = 7
    path.write_text(json.dumps(config))
    with pytest.raises(LibraryMismatch, match="num_crops is 7, the library was compiled for 6"):
        open_model(artifact, image_models.library("phi3_v"), EngineConfig())


@pytest.fixture(scope="module")
def opened(image_models: ImageModels) -> Iterator[OpenModel]:
    opened = open_case(image_models, "phi3_v")
    yield opened
    opened.close()


@pytest.fixture
def served(opened: OpenModel) -> Iterator[ServedModels]:
    with served_as("see", opened) as models:
        yield models


@pytest.fixture
def client(served: ServedModels) -> Iterator[httpx.Client]:
    with client_of(served) as client:
        yield client


def test_python_engine_answers_as_the_reference(opened: OpenModel, served: ServedModels) -> None:
    assert served.chat is not None
    served.chat.worker.start()
    engine = MLCEngine.from_models(served, lambda: None)
    reference = load_tiled_reference("phi3_v")
    expected = opened.tokenizer.decode(reference.greedy_tokens)
    answer = engine.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(reference.token_ids)
    again = engine.chat.completions.create(messages=MESSAGES, **GREEDY)
    details = again.usage.prompt_tokens_details
    assert again.choices[0].message.content == expected
    assert details is not None and details.cached_tokens > 200


def test_http_answers_as_the_reference(opened: OpenModel, client: httpx.Client) -> None:
    reference = load_tiled_reference("phi3_v")
    body = {"model": "see", "messages": MESSAGES, **GREEDY}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    content = answer.json()["choices"][0]["message"]["content"]
    assert content == opened.tokenizer.decode(reference.greedy_tokens)
    tokens = client.post("/tokenize", json={"model": "see", "messages": MESSAGES}).json()
    assert tokens["tokens"] == reference.token_ids


@pytest.mark.parametrize("place", ["<|image_1|>", "<|image_27|>", "<|image|>"])
def test_texts_that_stand_for_images_are_refused(client: httpx.Client, place: str) -> None:
    messages = [{"role": "user", "content": [part("high.png"), text(f"what is {place}?")]}]
    answer = client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages[0].content"
    assert f"has the text '{place}', which stands for an image" in error["message"]
