"""`/v1/messages` and `/v1/messages/count_tokens` over HTTP, with Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai_shapes import unknown_fields
from served import MODEL, Served, served

from mlc_llm.serve.options import AppOptions
from mlc_llm.serve.protocol.anthropic import CountTokensRequest, MessagesRequest

PATH = "/v1/messages"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def connect(url: str, **options: Any) -> anthropic.Anthropic:
    given = {"api_key": "none", "max_retries": 0, "timeout": 20, **options}
    return anthropic.Anthropic(base_url=url, **given)


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    with connect(server.url) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    [block] = message.content
    assert block.type == "text"
    return block.text


def test_a_text(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert message.id.startswith("msg_") and message.role == "assistant"
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert len(text_of(message)) == 5
    assert message.usage.output_tokens == 5
    assert not unknown_fields(message)


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model=MODEL, messages=HELLO, max_tokens=9)
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=9) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == text_of(whole) == text_of(final) and len(texts) > 1
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 9
    events = list(client.messages.create(model=MODEL, messages=HELLO, max_tokens=2, stream=True))
    assert not [name for event in events for name in unknown_fields(event)]


def test_events_have_names(server: Served) -> None:
    text = server.client.post(PATH, json={"messages": HELLO, "max_tokens": 2, "stream": True}).text
    names = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        names.append(name.removeprefix("event: "))
        assert names[-1] == json.loads(data.removeprefix("data: "))["type"]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-1] == "message_stop"


def test_system_and_tokens_are_those_of_a_chat(server: Served, client: anthropic.Anthropic) -> None:
    messages = [{"role": "system", "content": "be"}, *HELLO]
    body = {"messages": messages, "max_tokens": 6}
    chat = server.client.post("/v1/chat/completions", json=body).json()
    message = client.messages.create(model=MODEL, messages=HELLO, system="be", max_tokens=6)
    assert text_of(message) == chat["choices"][0]["message"]["content"]
    counted = client.messages.count_tokens(model=MODEL, messages=HELLO, system="be")
    assert counted.input_tokens == chat["usage"]["prompt_tokens"]


def test_usage_counts_cached_tokens_apart(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "a" * 100}]
    total = client.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    for _ in range(2):
        usage = client.messages.create(model=MODEL, messages=messages, max_tokens=1).usage
        assert usage.cache_read_input_tokens is not None
        assert usage.input_tokens + usage.cache_read_input_tokens == total
    assert usage.cache_read_input_tokens >= 16
    with client.messages.stream(model=MODEL, messages=messages, max_tokens=1) as stream:
        started = stream.current_message_snapshot.usage if next(iter(stream)) else None
    assert started is not None and started.cache_read_input_tokens == usage.cache_read_input_tokens


def test_why_an_answer_stops(client: anthropic.Anthropic) -> None:
    text = text_of(client.messages.create(model=MODEL, messages=HELLO, max_tokens=12))
    stop = text[4:6]
    place = text.index(stop)
    message = client.messages.create(
        model=MODEL, messages=HELLO, max_tokens=12, stop_sequences=["nothing", stop]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == text[:place]
    message = client.messages.create(model=MODEL, messages=HELLO, max_tokens=10_000)
    assert message.stop_reason == "model_context_window_exceeded"


def test_sampling_reaches_the_engine(server: Served) -> None:
    fields = {"temperature": 1.0, "top_p": 0.5, "top_k": 1}
    body = {"messages": HELLO, "max_tokens": 6}
    answer = server.client.post(PATH, json={**body, **fields}).json()
    plain = server.client.post(PATH, json=body).json()
    assert answer["content"] == plain["content"]  # of one token a step, whatever is drawn


def test_every_field_of_anthropic_is_known() -> None:
    theirs = set(message_create_params.MessageCreateParamsBase.__annotations__) | {"stream"}
    assert theirs <= set(MessagesRequest.model_fields)
    theirs = set(message_count_tokens_params.MessageCountTokensParams.__annotations__)
    assert theirs <= set(CountTokensRequest.model_fields)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [*HELLO, {"role": "assistant", "content": "he"}]}, "the beginning of the answer"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stop_sequences": ["a"] * 99}, "stop_sequences"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens goes with"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 3}}, "thinking.budget_tokens goes with"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 4}}, "max_tokens, 4, counts thoughts too"),
    ({"thinking": {"type": "enabled", "budget_tokens": 3}}, "nothing marks what this model thinks"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"speed": "fast"}, "speed"),
    ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": 0}]}, "tools[0].defer_loading"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"max_token": 5}, "max_token"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED, ids=str)
def test_what_is_not_supported_is_refused_by_name(
    server: Served, fields: dict[str, Any], name: str
) -> None:
    body = {"messages": HELLO, "max_tokens": 4, **fields}
    response = server.client.post(PATH, json=body)
    assert response.status_code == 400
    refusal = response.json()
    assert refusal.keys() == {"type", "error"} and refusal["type"] == "error"
    assert refusal["error"]["type"] == "invalid_request_error"
    assert name in refusal["error"]["message"]


def test_harmless_fields_are_taken(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=1,
        metadata={"user_id": "me"},
        service_tier="auto",
        thinking={"type": "adaptive"},
        cache_control={"type": "ephemeral"},
    )
    assert message.usage.output_tokens == 1


def test_errors_are_the_classes_of_the_client(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="other", messages=HELLO, max_tokens=1)
    assert unknown.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": unknown.value.body["error"]["message"]},  # type: ignore[index]
    }
    long: list[Any] = [{"role": "user", "content": "xyz" * 500}]
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="tokens"):
            client.messages.create(model=MODEL, messages=long, max_tokens=1, stream=stream)


def test_the_key_comes_as_either_client_sends_it() -> None:
    with served(options=AppOptions(api_key="sk-1")) as running:
        for key in ({"api_key": "sk-1"}, {"auth_token": "sk-1", "api_key": None}):
            with connect(running.url, **key) as client:
                assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0
        with connect(running.url, api_key="sk-2") as client:
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.create(model=MODEL, messages=HELLO, max_tokens=1)


def test_a_failure_on_the_way_is_an_event() -> None:
    with served(step_s=0.002) as running:

        def fail(step: Any) -> None:
            if len(running.runner.steps) > 8:
                running.runner.error = RuntimeError("out of order")

        running.runner.before_step = fail
        with connect(running.url) as client:
            events = client.messages.create(model=MODEL, messages=HELLO, max_tokens=99, stream=True)
            with pytest.raises(anthropic.APIStatusError) as failed:
                list(events)
        assert failed.value.body["error"]["type"] == "api_error"  # type: ignore[index]
        running.runner.before_step = lambda step: None
        running.assert_works()


def test_who_goes_away_aborts_the_answer() -> None:
    with served(step_s=0.005) as running:
        body = {"messages": HELLO, "max_tokens": 400, "stream": True}
        with running.client.stream("POST", PATH, json=body) as response:
            assert next(response.iter_bytes())
        running.wait_until_idle()
        num_steps = len(running.runner.steps)
        assert num_steps < 400
        with connect(running.url, timeout=0.3) as client:
            with pytest.raises(anthropic.APITimeoutError):
                client.messages.create(model=MODEL, messages=HELLO, max_tokens=400)
        running.wait_until_idle()
        assert len(running.runner.steps) - num_steps < 400
