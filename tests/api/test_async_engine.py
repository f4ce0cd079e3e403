"""`AsyncMLCEngine` on a fake model: what can be asked, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import Any

import pytest
from fake_engine import Parts

from mlc_llm.api import AsyncMLCEngine, AsyncStream
from mlc_llm.errors import ContextTooLong, EngineStopped, RequestError, UnknownModel
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.protocol.chat import ChatCompletion

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


async def wait_until_idle(parts: Parts) -> None:
    worker = parts.models.chat.worker
    deadline = time.monotonic() + 5
    while worker.num_requests or worker.metrics.read_load().num_used_pages:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_a_chat_whole_and_as_a_stream(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> None:
        create = async_engine.chat.completions.create
        whole = await create(messages=HELLO, max_tokens=12, model="tiny")
        assert isinstance(whole, ChatCompletion)
        text = whole.choices[0].message.content
        assert text is not None and len(text) == 12
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        stream = await create(
            messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        assert isinstance(stream, AsyncStream)
        chunks = [chunk async for chunk in stream]
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == text
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12

    asyncio.run(ask())


def test_an_answer_may_be_part_of_the_next_request(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> None:
        create = async_engine.chat.completions.create
        answer = (await create(messages=HELLO, max_tokens=4)).choices[0].message
        more = [*HELLO, answer, {"role": "user", "content": "more"}]
        plain = [*HELLO, {"role": "assistant", "content": answer.content}, more[-1]]
        both = [await create(messages=each, max_tokens=8) for each in (more, plain)]
        assert both[0].choices[0].message.content == both[1].choices[0].message.content
        assert both[0].usage == both[1].usage

    asyncio.run(ask())


def test_completions_of_several_prompts(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> None:
        create = async_engine.completions.create
        answer = await create(prompt=["he", "ll"], max_tokens=3, n=2, echo=True)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text[:2] for choice in answer.choices] == ["he", "he", "ll", "ll"]
        stream = await create(prompt="he", max_tokens=3, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
        assert "he" + text == answer.choices[0].text

    asyncio.run(ask())


def test_embeddings_and_models(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> None:
        answer = await async_engine.embeddings.create(input=["hello", "he"], model="vectors")
        assert [item.index for item in answer.data] == [0, 1]
        models = await async_engine.models.list()
        assert [model.id for model in models.data] == ["tiny", "vectors"]
        assert (await async_engine.models.retrieve("tiny")).max_model_len == 256
        with pytest.raises(UnknownModel):
            await async_engine.models.retrieve("other")

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": HELLO, "temprature": 0.5}, "temprature"),
        ({"messages": HELLO, "extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"messages": HELLO, "n": 1, "extra_body": {"n": 2}}, "n"),
        ({"messages": HELLO, "extra_body": "text"}, "extra_body"),
        ({"messages": HELLO, "temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_what_is_wrong_is_named(
    async_engine: AsyncMLCEngine, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(async_engine.chat.completions.create(**fields))
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert param in str(caught.value)


def test_errors_of_requests_are_ours(async_engine: AsyncMLCEngine) -> None:
    async def ask(**fields: Any) -> None:
        await async_engine.completions.create(**fields)

    with pytest.raises(UnknownModel):
        asyncio.run(ask(prompt="he", model="gpt-4"))
    with pytest.raises(ContextTooLong):
        asyncio.run(ask(prompt="he " * 300))
    with pytest.raises(ContextTooLong):
        asyncio.run(ask(prompt="he " * 300, stream=True))


def test_extensions_by_name_or_in_extra_body(async_engine: AsyncMLCEngine) -> None:
    async def ask(**fields: Any) -> str | None:
        answer = await async_engine.chat.completions.create(messages=HELLO, max_tokens=6, **fields)
        return answer.choices[0].message.content

    plain = asyncio.run(ask(top_k=1, ignore_eos=True))
    assert asyncio.run(ask(extra_body={"top_k": 1, "ignore_eos": True})) == plain


def test_abort_ends_a_request(async_engine: AsyncMLCEngine, parts: Parts) -> None:
    async def ask() -> None:
        parts.runner.gate.clear()
        task = asyncio.ensure_future(
            async_engine.chat.completions.create(messages=HELLO, request_id="mine")
        )
        await asyncio.to_thread(parts.runner.is_in_step.wait, 5)
        await async_engine.abort("mine")
        parts.runner.gate.set()
        answer = await asyncio.wait_for(task, 5)
        assert "mine" in answer.id
        assert len(answer.choices[0].message.content or "") < 5
        await async_engine.abort("nobody's")
        await wait_until_idle(parts)

    asyncio.run(ask())


def test_abort_by_the_id_of_an_answer(async_engine: AsyncMLCEngine, parts: Parts) -> None:
    async def ask() -> None:
        stream = await async_engine.completions.create(prompt=["he", "ll"], stream=True)
        first = await anext(stream)
        parts.runner.gate.clear()
        await async_engine.abort(first.id)
        parts.runner.gate.set()
        assert len([chunk async for chunk in stream]) < 200
        await wait_until_idle(parts)

    asyncio.run(ask())


@pytest.mark.parametrize("way", ["close", "block", "drop"])
def test_leaving_a_stream_aborts_it(async_engine: AsyncMLCEngine, parts: Parts, way: str) -> None:
    async def ask() -> None:
        stream = await async_engine.chat.completions.create(messages=HELLO, stream=True)
        await anext(stream)
        if way == "close":
            await stream.close()
        elif way == "block":
            async with stream:
                pass
        else:
            del stream
            gc.collect()
        await wait_until_idle(parts)
        assert len(parts.runner.steps) < 200

    asyncio.run(ask())


def test_two_event_loops_one_after_the_other(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> str | None:
        answer = await async_engine.chat.completions.create(messages=HELLO, max_tokens=5)
        return answer.choices[0].message.content

    assert asyncio.run(ask()) == asyncio.run(ask())


def test_metrics_and_reset(async_engine: AsyncMLCEngine) -> None:
    async def ask() -> int:
        messages = [{"role": "user", "content": "hello " * 10}]
        answer = await async_engine.chat.completions.create(messages=messages, max_tokens=4)
        return answer.usage.prompt_tokens_details.cached_tokens

    async def ask_thrice() -> None:
        assert await ask() == 0
        assert await ask() > 0
        await async_engine.reset()
        assert await ask() == 0
        metrics = await async_engine.metrics()
        assert metrics["completion_tokens_sum"] == metrics.metrics["completion_tokens_sum"] == 12
        assert "mlc_llm_generation_tokens_total 12" in metrics.prometheus_text()

    asyncio.run(ask_thrice())


def test_terminate_ends_everything_once(async_engine: AsyncMLCEngine, parts: Parts) -> None:
    async def ask() -> None:
        parts.runner.gate.clear()
        stream = await async_engine.chat.completions.create(messages=HELLO, stream=True)
        await asyncio.to_thread(parts.runner.is_in_step.wait, 5)
        async_engine.terminate()
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass
        async_engine.terminate()
        with pytest.raises(EngineStopped, match="terminated"):
            await async_engine.chat.completions.create(messages=HELLO)
        for method in (async_engine.metrics, async_engine.reset, async_engine.models.list):
            with pytest.raises(EngineStopped):
                await method()

    asyncio.run(ask())
    assert parts.closings == ["closed"]


def test_the_block_and_the_last_reference_end_the_engine(parts: Parts) -> None:
    async def ask() -> None:
        async with AsyncMLCEngine.from_models(parts.models, parts.close) as engine:
            await engine.chat.completions.create(messages=HELLO, max_tokens=1)

    asyncio.run(ask())
    assert parts.closings == ["closed"]


def test_a_stream_keeps_its_engine(parts: Parts) -> None:
    async def ask() -> None:
        engine = AsyncMLCEngine.from_models(parts.models, parts.close)
        stream = await engine.chat.completions.create(messages=HELLO, max_tokens=9, stream=True)
        del engine
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert len(text) == 9 and not parts.closings
        del stream
        assert parts.closings == ["closed"]

    asyncio.run(ask())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_it_says_what_to_do(async_engine: AsyncMLCEngine, parts: Parts) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = "no error"
        try:
            asyncio.run(async_engine.chat.completions.create(messages=HELLO))
        except EngineStopped as error:
            message = str(error)
        finally:
            async_engine.terminate()
            os.write(writer, f"{message} {parts.closings}".encode())
            os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 1000).decode()
    os.close(reader), os.close(writer)
    assert "fork" in told and told.endswith("[]")


def test_an_engine_of_vectors_alone(parts: Parts) -> None:
    async def run() -> None:
        async with AsyncMLCEngine.from_models(
            ServedModels(None, parts.models.embedding), lambda: None
        ) as engine:
            answer = await engine.embeddings.create(input="hello")
            assert len(answer.data) == 1
            assert [card.id for card in (await engine.models.list()).data] == ["vectors"]
            for call in (
                engine.metrics(),
                engine.reset(),
                engine.abort("a"),
                engine.completions.create(prompt="hello"),
            ):
                with pytest.raises(UnknownModel, match="only one for embeddings"):
                    await call

    asyncio.run(run())
