"""Chats about images with a real tiny LLaVA: through the Python engine and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import seeing
from image_models import (
    CASES,
    CHAT_IMAGES,
    REFERENCES,
    ImageModels,
    data_url,
    load_reference,
)
from seeing import GREEDY, client_of, open_case, served_as, text

from mlc_llm.api import MLCEngine
from mlc_llm.engine.open import OpenModel
from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.engine.session import ChatSession
from mlc_llm.errors import RequestError
from mlc_llm.serve.catalog import ServedModels

pytestmark = pytest.mark.cpu

part = partial(seeing.part, detail="auto")

# The reference's chat.
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "See."},
    {"role": "user", "content": [part("wide.png"), text("what is it?"), part("high.png")]},
    {"role": "assistant", "content": "two things"},
    {"role": "user", "content": [text("and that?"), part("wide.png")]},
]


@pytest.fixture(scope="module")
def opened(image_models: ImageModels) -> Iterator[OpenModel]:
    opened = open_case(image_models, "llava")
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


def answer_of(case: str, opened: OpenModel) -> str:
    return opened.tokenizer.decode(load_reference(case).greedy_tokens)


@pytest.mark.parametrize("name", CASES)
def test_prompt_and_its_logits_equal_the_reference(image_models: ImageModels, name: str) -> None:
    """From messages to log-probabilities at every place of the prompt."""
    reference = load_reference(name)
    opened = open_case(image_models, name)
    prompt = opened.prompts.build(MESSAGES)
    assert prompt.token_ids == reference.token_ids
    for image, known in zip(prompt.images, CHAT_IMAGES, strict=True):
        np.testing.assert_allclose(image.pixels, reference.pixels[known], atol=2e-6)
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


def test_python_engine_answers_as_the_reference(opened: OpenModel, served: ServedModels) -> None:
    assert served.chat is not None
    served.chat.worker.start()
    engine = MLCEngine.from_models(served, lambda: None)
    expected = answer_of("llava", opened)
    answer = engine.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(load_reference("llava").token_ids)
    again = engine.chat.completions.create(messages=MESSAGES, **GREEDY)
    details = again.usage.prompt_tokens_details
    assert again.choices[0].message.content == expected
    assert details is not None and details.cached_tokens > 48
    chunks = engine.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == expected


def test_http_answers_as_the_reference(opened: OpenModel, client: httpx.Client) -> None:
    body = {"model": "see", "messages": MESSAGES, **GREEDY}
    expected = answer_of("llava", opened)
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == expected
    stream = client.post("/v1/chat/completions", json={**body, "stream": True})
    events = [line[6:] for line in stream.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == expected
    tokens = client.post("/tokenize", json={"model": "see", "messages": MESSAGES}).json()
    assert tokens["tokens"] == load_reference("llava").token_ids
    # MLC LLM's clients may send the URL alone.
    plain = [
        {"role": "user", "content": [{"type": "image_url", "image_url": data_url("high.png")}]}
    ]
    assert client.post("/v1/chat/completions", json={**body, "messages": plain}).status_code == 200


def test_another_image_is_another_question(client: httpx.Client) -> None:
    def ask(image: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": [part(image), text("what is it?")]}]
        body = {"messages": messages, "logprobs": True, "cache_salt": "apart", **GREEDY}
        answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
        return answer

    first, other, again = ask("wide.png"), ask("high.png"), ask("wide.png")
    assert first["choices"][0]["logprobs"] != other["choices"][0]["logprobs"]
    assert first["choices"][0]["logprobs"] == again["choices"][0]["logprobs"]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (first, other, again)]
    # The page in which the image begins has none of its rows before.
    assert cached == [0, 0, 32]


def test_a_later_turn_finds_the_image(client: httpx.Client) -> None:
    question = {"role": "user", "content": [part("square.png"), text("what is it?")]}
    body = {"messages": [question], "cache_salt": "turns", **GREEDY}
    first = client.post("/v1/chat/completions", json=body).json()
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    later = {"role": "user", "content": [text("and now?"), part("wide.png")]}
    body["messages"] = [question, said, later]
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32


WHERE = "messages[0].content[0].image_url"
URL = f"{WHERE}.url"


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        ({"url": "https://example.com/a.png"}, URL, "images are not fetched"),
        ({"url": "data:image/png;base64,%%%%"}, URL, "is not base64"),
        ({"url": "data:image/png;base64,AAAA"}, URL, "not an image that can be read"),
        ({"url": data_url("wide.png")[:3002]}, URL, "not an image that can be read"),
        ({"url": data_url("wide.png"), "detail": "fine"}, f"{WHERE}.detail", "must be one of auto"),
        ({"url": data_url("wide.png"), "size": 4}, WHERE, "unknown field 'size'"),
        ({}, URL, "must be a data URL"),
        ("", WHERE, "images are not fetched"),
        (None, WHERE, "must be a data URL"),
        (17, WHERE, "must be a data URL"),
    ],
)
def test_bad_images_are_refused_in_openais_shape(
    client: httpx.Client, part: Any, param: str, message: str
) -> None:
    content = [{"type": "image_url", "image_url": part}, text("what is it?")]
    answer = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (
            [{"role": "assistant", "content": [part("wide.png")]}],
            URL,
            "images belong to messages of role 'user'",
        ),
        (
            [{"role": "user", "content": "what is <image>?"}],
            "messages[0].content",
            "has the text '<image>', which stands for an image",
        ),
        (
            [{"role": "user", "content": [part("wide.png")] * 17}],
            "messages",
            "have 17 images, at most 16",
        ),
        (
            [{"role": "user", "content": [part("wide.png")] * 16}] * 1
            + [{"role": "user", "content": "a" * 120}],
            None,
            "maximum context length is 256",
        ),
        (
            [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}],
            "messages[0].content[0].type",
            "has type 'video_url'",
        ),
    ],
)
def test_images_out_of_place_are_refused(
    client: httpx.Client, messages: list[Any], param: str | None, message: str
) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_a_session_of_one_user_sees_too(image_models: ImageModels) -> None:
    name = "llava_full_old_config"
    session = ChatSession.open(image_models.artifact(name), image_models.library(name))
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = session.tokenizer.decode(load_reference(name).greedy_tokens)
    assert "".join(piece.text for piece in session.chat(MESSAGES, params)) == expected
    assert session.read_image(REFERENCES / "wide.png") == data_url("wide.png")
    with pytest.raises(RequestError, match="it must begin as"):
        session.read_image(Path(__file__))
    with pytest.raises(RequestError, match="images are not fetched"):
        bad = [{"type": "image_url", "image_url": {"url": "a.png"}}]
        next(iter(session.chat([{"role": "user", "content": bad}], params)))
    session.close()


def test_agents_show_images_as_their_protocols_do(client: httpx.Client, opened: OpenModel) -> None:
    names = ("wide.png", "high.png")
    sources = []
    for name in names:
        kind, _, data = data_url(name).removeprefix("data:").partition(";base64,")
        sources.append({"type": "base64", "media_type": kind, "data": data})
    pictures = [{"type": "input_image", "image_url": data_url(name)} for name in names]
    again = {"role": "assistant", "content": "two things"}
    body: dict[str, Any] = {
        "instructions": "See.",
        "input": [
            {
                "role": "user",
                "content": [
                    pictures[0],
                    {"type": "input_text", "text": "what is it?"},
                    pictures[1],
                ],
            },
            again,
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "and that?"}, pictures[0]],
            },
        ],
        "temperature": 0,
        "max_output_tokens": 20,
    }
    response = client.post("/v1/responses", json=body).json()
    assert response["output"][0]["content"][0]["text"] == answer_of("llava", opened)
    images = [{"type": "image", "source": source} for source in sources]
    body = {
        "system": "See.",
        "messages": [
            {"role": "user", "content": [images[0], text("what is it?"), images[1]]},
            again,
            {"role": "user", "content": [text("and that?"), images[0]]},
        ],
        "temperature": 0,
        "max_tokens": 20,
    }
    message = client.post("/v1/messages", json=body).json()
    assert message["content"][0]["text"] == answer_of("llava", opened)
    body["messages"][0]["content"][0]["source"]["data"] = "QUJD"
    refused = client.post("/v1/messages", json=body)
    assert refused.status_code == 400 and refused.json()["type"] == "error"
