"""OpenAI's Python client, unchanged, against a server of the demo model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from demo_model import place_demo_model
from program import Program
from running_server import MODEL, RunningServer, running_server

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

QUESTION: list[Any] = [{"role": "user", "content": "Name three colours and say why."}]
STORY = "Once upon a time there was a"


@pytest.fixture(scope="module")
def server(program: Program, demo_gguf: Path) -> Iterator[RunningServer]:
    place_demo_model(program, demo_gguf)
    with running_server(program) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    """Answer the question, greedily unless the options say otherwise."""
    values = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(**values)


def text_of(chunks: Any, index: int = 0) -> str:
    """Join what the chunks of a stream say in one choice."""
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", MODEL, 1)
    assert choice.message.role == "assistant"
    assert len(choice.message.content.split()) > 5
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    again = ask(client)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert ask(client, max_tokens=None, max_completion_tokens=24).choices == again.choices


def test_a_stream_says_the_same_and_tells_usage(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 12  # it streams
    plain = list(ask(client, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_the_stream_helper(client: openai.OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text.split()[6]  # the helper takes only answers that were not cut off
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, stop=stop
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == text[: text.index(stop)]


def test_choices(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    answer = ask(client, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 36
    chunks = list(ask(client, **options, stream=True))
    assert [text_of(chunks, index) for index in range(3)] == texts


def test_seeds(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = ask(client, temperature=1.0, seed=seed)
        return str(answer.choices[0].message.content)

    assert text(1) == text(1) != text(2)


def test_stops(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:6]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never said", stop]):
        choice = ask(client, stop=given).choices[0]
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    chunks = list(ask(client, stop=stop, stream=True))
    assert text_of(chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3, max_tokens=10).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 10
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        # The likeliest is the one that was taken.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 3
    chunks = list(ask(client, logprobs=True, top_logprobs=3, max_tokens=10, stream=True))
    streamed = [
        entry
        for chunk in chunks
        for c in chunk.choices
        if c.logprobs
        for entry in c.logprobs.content
    ]
    assert streamed == entries
    assert ask(client, max_tokens=2).choices[0].logprobs is None


def test_logit_bias(client: openai.OpenAI, server: RunningServer) -> None:
    body = {"prompt": " blue", "add_special_tokens": False}
    token = httpx.post(f"{server.url}/tokenize", json=body, timeout=30).json()["tokens"]
    assert len(token) == 1
    forced = ask(client, logit_bias={str(token[0]): 100}, max_tokens=3, stop=[])
    assert forced.choices[0].message.content.split() == ["blue"] * 3
    first = ask(client, max_tokens=1, logprobs=True).choices[0]
    body["prompt"] = first.message.content
    token = httpx.post(f"{server.url}/tokenize", json=body, timeout=30).json()["tokens"]
    other = ask(client, logit_bias={str(token[0]): -100}, max_tokens=1)
    assert other.choices[0].message.content != first.message.content


def test_completions(client: openai.OpenAI, server: RunningServer) -> None:
    def complete(**options: Any) -> Any:
        values = {"model": MODEL, "prompt": STORY, "max_tokens": 8, "temperature": 0, **options}
        return client.completions.create(**values)

    answer = complete()
    text = answer.choices[0].text
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 8
    assert len(text.split()) > 3
    assert "".join(chunk.choices[0].text for chunk in complete(stream=True)) == text
    assert complete(echo=True).choices[0].text == STORY + text
    assert complete(suffix="!?").choices[0].text == text + "!?"
    body = {"prompt": STORY}
    tokens = httpx.post(f"{server.url}/tokenize", json=body, timeout=30).json()["tokens"]
    assert complete(prompt=tokens).choices[0].text == text
    both = complete(prompt=[STORY, "The sea is"], n=2).choices
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    assert both[0].text == both[1].text == text != both[2].text == both[3].text
    block = complete(logprobs=2).choices[0].logprobs
    assert "".join(block.tokens) == text
    assert len(block.token_logprobs) == len(block.top_logprobs) == len(block.text_offset) == 8
    echoed = complete(logprobs=0, echo=True, max_tokens=1).choices[0].logprobs
    assert len(echoed.tokens) == len(tokens) + 1
    assert echoed.token_logprobs[0] is None


def test_models(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == [MODEL]
    assert client.models.retrieve(MODEL) == models[0]


def test_many_at_once_with_the_asynchronous_client(server: RunningServer) -> None:
    async def ask_all() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:

            async def text(number: int) -> str:
                answer = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"Write about the number {number}."}],
                    max_tokens=8,
                    temperature=0.9,
                    seed=number,
                )
                return answer.choices[0].message.content or ""

            together = await asyncio.gather(*(text(number) for number in range(12)))
            return together, [await text(number) for number in range(12)]

    together, alone = asyncio.run(ask_all())
    assert together == alone
    assert len(set(together)) > 6


def test_leaving_a_stream_ends_the_request(client: openai.OpenAI, server: RunningServer) -> None:
    with ask(client, max_tokens=4000, extra_body={"ignore_eos": True}, stream=True) as stream:
        for _ in range(5):
            next(stream)
        assert server.metric("num_requests_running") == 1
    server.wait_until_idle(2)


def test_mistakes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, top_p=2)
    assert (bad.value.param, bad.value.type) == ("top_p", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(client, messages=[{"role": "user", "content": "word " * 9000}])
    assert too_long.value.code == "context_length_exceeded"
    assert "this model's maximum context length is 8,192 tokens" in too_long.value.message
    with pytest.raises(openai.BadRequestError) as tools:
        ask(client, web_search_options={})
    assert tools.value.param == "web_search_options"
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, model="another")
    assert unknown.value.code == "model_not_found"
    assert "GET v1/models" in unknown.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="text")


@pytest.fixture(scope="module")
def strict_server(program: Program, demo_gguf: Path) -> Iterator[RunningServer]:
    """One request at a time, with a key, none may wait, and none may take long."""
    place_demo_model(program, demo_gguf)
    options = ("--mode", "interactive", "--api-key", "secret", "--max-queued-requests", "0")
    with running_server(program, *options, "--request-timeout", "1.5") as running:
        yield running


def test_a_key_is_asked_for(strict_server: RunningServer) -> None:
    base_url = f"{strict_server.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(client)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=base_url, api_key="secret", max_retries=0) as client:
        assert ask(client, max_tokens=2).usage.completion_tokens == 2


def test_too_many_and_too_long(strict_server: RunningServer) -> None:
    base_url = f"{strict_server.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="secret", max_retries=0, timeout=60) as client:

        def outcome(_: int) -> openai.APIStatusError | None:
            try:
                ask(client, max_tokens=8000, extra_body={"ignore_eos": True})
            except openai.APIStatusError as error:
                return error
            return None

        with ThreadPoolExecutor(3) as threads:
            errors = list(threads.map(outcome, range(3)))
        refused = [error for error in errors if isinstance(error, openai.RateLimitError)]
        assert len(refused) == 2
        assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
        late = [error for error in errors if error not in refused]
        assert late[0] is not None and late[0].status_code == 408
        time.sleep(0.2)  # a step, in which the engine lets go of it
        assert ask(client, max_tokens=2).usage.completion_tokens == 2


def test_the_client_tries_again_by_itself(strict_server: RunningServer) -> None:
    base_url = f"{strict_server.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="secret", max_retries=9, timeout=60) as client:
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(lambda _: ask(client, max_tokens=40), range(2)))
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
