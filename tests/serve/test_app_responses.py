"""`/v1/responses` over HTTP, with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import response_create_params
from openai_shapes import unknown_fields
from served import MODEL, Served, served

from mlc_llm.serve.protocol.responses import ResponseRequest

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_a_text(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="hello", max_output_tokens=5, metadata={"a": "b"}, temperature=0.5
    )
    assert response.id.startswith("resp_") and response.object == "response"
    assert (response.status, response.error) == ("incomplete", None)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert len(response.output_text) == 5
    assert (response.metadata, response.temperature) == ({"a": "b"}, 0.5)
    assert response.usage is not None
    assert response.usage.output_tokens == 5
    assert response.usage.total_tokens == response.usage.input_tokens + 5
    assert not unknown_fields(response)


def test_instructions_are_the_first_message(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}],
        max_tokens=6,
    )
    response = client.responses.create(
        model=MODEL, instructions="be", input="hello", max_output_tokens=6
    )
    assert response.output_text == chat.choices[0].message.content
    other = client.responses.create(model=MODEL, input="hello", max_output_tokens=6)
    assert other.output_text != response.output_text


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="hello", max_output_tokens=9)
    events = list(
        client.responses.create(model=MODEL, input="hello", max_output_tokens=9, stream=True)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert not [name for event in events for name in unknown_fields(event)]
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text and len(texts) > 1
    first, last = events[0], events[-1]
    assert first.type == "response.created" and last.type == "response.incomplete"
    assert first.response.id == last.response.id
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None and last.response.usage.output_tokens == 9


def test_events_have_names_and_no_done(server: Served) -> None:
    body = {"input": "hello", "max_output_tokens": 2, "stream": True}
    text = server.client.post(PATH, json=body).text
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert "[DONE]" not in text


def test_the_conversation_is_sent_again(client: openai.OpenAI) -> None:
    conversation: list[Any] = [{"role": "user", "content": "hello"}]
    for number in range(3):
        response = client.responses.create(model=MODEL, input=conversation, max_output_tokens=20)
        conversation += response.output
        conversation.append({"role": "user", "content": f"and {number}"})
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens >= 16


def test_every_field_of_openai_is_known() -> None:
    theirs = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert theirs <= set(ResponseRequest.model_fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": "a", "x": 1}]}, "input[0].x"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "a" for number in range(17)}}, "metadata"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    body = {"input": "hello", **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/responses", body=body, cast_to=object)
    assert refused.value.param == param
    assert param in refused.value.message


def test_harmless_fields_are_taken(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input="hello",
        max_output_tokens=1,
        store=False,
        include=[],
        truncation="disabled",
        background=False,
        prompt_cache_key="k",
        safety_identifier="me",
        service_tier="auto",
        text={"format": {"type": "text"}},
    )
    assert response.service_tier == "default"


def test_errors_have_their_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="hello")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            client.responses.create(model=MODEL, input="xyz" * 500, stream=stream)
        assert long.value.code == "context_length_exceeded"


def test_a_failure_on_the_way_is_the_last_event() -> None:
    with served(step_s=0.002) as running:

        def fail(step: Any) -> None:
            if len(running.runner.steps) > 8:
                running.runner.error = RuntimeError("out of order")

        running.runner.before_step = fail
        with openai.OpenAI(
            base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client:
            events = list(
                client.responses.create(
                    model=MODEL, input="hello", max_output_tokens=99, stream=True
                )
            )
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last = events[-1]
        assert last.type == "response.failed"
        assert last.response.status == "failed" and last.response.error is not None
        assert last.response.error.code == "server_error"
        assert last.response.output[0].status == "incomplete"  # type: ignore[union-attr]
        running.runner.before_step = lambda step: None
        running.assert_works()


def test_who_goes_away_aborts_the_response() -> None:
    with served(step_s=0.005) as running:
        body = {"input": "hello", "max_output_tokens": 400, "stream": True}
        with running.client.stream("POST", PATH, json=body) as response:
            assert next(response.iter_bytes())
        running.wait_until_idle()
        num_steps = len(running.runner.steps)
        assert num_steps < 400
        with pytest.raises(openai.APITimeoutError):
            openai.OpenAI(
                base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=0.3
            ).responses.create(model=MODEL, input="hello", max_output_tokens=400)
        running.wait_until_idle()
        assert len(running.runner.steps) - num_steps < 400
