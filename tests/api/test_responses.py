"""`responses.create` of both engines on a fake model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_engine import Parts

from mlc_llm.api import AsyncMLCEngine, AsyncStream, MLCEngine, Stream
from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.response_events import Response


def test_a_response_whole_and_as_a_stream(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> None:
        create = async_engine.responses.create
        whole = await create(input="hello", max_output_tokens=12, model="tiny")
        assert isinstance(whole, Response)
        assert len(whole.output_text) == 12 and whole.status == "incomplete"
        stream = await create(input="hello", max_output_tokens=12, stream=True)
        assert isinstance(stream, AsyncStream)
        events = [event async for event in stream]
        assert "".join(event.delta or "" for event in events) == whole.output_text
        assert events[-1].response is not None
        assert events[-1].response.output_text == whole.output_text

    asyncio.run(ask())


def test_items_of_a_response_may_be_sent_back(engine: MLCEngine) -> None:
    conversation: list[Any] = [{"role": "user", "content": "hello"}]
    first = engine.responses.create(input=conversation, max_output_tokens=4)
    conversation += [*first.output, {"role": "user", "content": "more"}]
    second = engine.responses.create(input=conversation, max_output_tokens=4)
    chat = engine.chat.completions.create(
        messages=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "more"},
        ],
        max_tokens=4,
    )
    assert second.output_text == chat.choices[0].message.content
    stream = engine.responses.create(input="hello", max_output_tokens=4, stream=True)
    assert isinstance(stream, Stream)
    assert "".join(event.delta or "" for event in stream) == first.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "input"), ({"input": "a", "store": True}, "store"), ({"input": "a", "n": 2}, "n")],
)
def test_what_is_wrong_is_named(engine: MLCEngine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.responses.create(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("name", ["mine", "resp_mine"])
def test_abort_ends_a_response(async_engine: AsyncMLCEngine, parts: Parts, name: str) -> None:
    async def ask() -> Response:
        parts.runner.gate.clear()
        create = async_engine.responses.create
        task = asyncio.ensure_future(create(input="hello", request_id="mine"))
        while parts.models.chat.worker.num_requests == 0:
            await asyncio.sleep(0.005)
        await async_engine.abort(name)
        parts.runner.gate.set()
        return await asyncio.wait_for(task, 10)

    response = asyncio.run(ask())
    assert response.id == "resp_mine" and len(response.output_text) < 100
