"""Chats that are refused, fail, take too long or are left, without HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
from chats import ask, text_of
from fakes import FakeRunner, Logits
from pydantic import ValidationError
from random_requests import random_fields
from scripted import TOKENIZER, run, scripted

from mlc_llm.errors import (
    ContextTooLong,
    EngineStopped,
    OptionError,
    QueueFull,
    RequestError,
    RequestTimeout,
    StepFailed,
)
from mlc_llm.serve.chat import chat, chat_stream
from mlc_llm.serve.protocol.chat import (
    ChatCompletionChunk,
    ChatCompletionRequest,
)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_wrong_requests_are_refused_before_the_first_chunk(
    fields: dict[str, Any], param: str
) -> None:
    async def work() -> None:
        async with scripted("a") as model:
            for answer in (chat, chat_stream):
                with pytest.raises(RequestError) as caught:
                    await answer(model, ask(**fields), "1")
                assert caught.value.param == param

    run(work())


def test_prompts_that_do_not_fit_are_refused_before_the_first_chunk() -> None:
    async def work() -> None:
        async with scripted("a") as model:
            with pytest.raises(ContextTooLong, match="257 tokens"):
                await chat_stream(
                    model, ask(messages=[{"role": "user", "content": "x" * 256}]), "1"
                )

    run(work())


def test_full_queue_and_stopped_engine_refuse() -> None:
    async def work() -> None:
        async with scripted("a" * 60, max_queued_requests=1) as model:
            streams = []
            with pytest.raises(QueueFull):
                for number in range(40):
                    streams.append(await chat_stream(model, ask(stream=True), str(number)))
            for chunks in streams:
                await chunks.aclose()
            streams.clear()
            while model.worker.num_requests:
                await asyncio.sleep(0.005)
            model.worker.stop()
            with pytest.raises(EngineStopped):
                await chat(model, ask(), "1")

    run(work())


def test_failed_step_raises_in_answers_and_streams() -> None:
    async def work() -> None:
        async with scripted("a" * 60) as model:
            runner = model.worker.engine._runner
            assert isinstance(runner, FakeRunner)
            usual, num_prompt = runner.logits_of, len(TOKENIZER.encode("hello")) + 1

            def break_after_five(tokens: list[int]) -> Logits:
                if len(tokens) == num_prompt + 5:
                    raise ValueError("broken")
                return usual(tokens)

            runner.logits_of = break_after_five
            with pytest.raises(StepFailed):
                await chat(model, ask(), "1")
            chunks = await chat_stream(model, ask(stream=True), "2")
            got = []
            with pytest.raises(StepFailed):
                async for chunk in chunks:
                    got.append(chunk)
            assert len(text_of(got)) <= 5
            runner.logits_of = usual
            assert (await chat(model, ask(max_tokens=2), "3")).choices[0].message.content == "aa"

    run(work())


def test_timeout_raises() -> None:
    async def work() -> None:
        async with scripted("a" * 200) as model:
            model.timeout_s = 1e-6
            with pytest.raises(RequestTimeout):
                await chat(model, ask(), "1")

    run(work())


@pytest.mark.parametrize("how", ["close", "drop", "cancel"])
def test_leaving_a_stream_frees_its_pages(how: str) -> None:
    async def work() -> None:
        async with scripted("a" * 240) as model:
            runner = model.worker.engine._runner
            assert isinstance(runner, FakeRunner)
            usual = runner.logits_of

            def slowly(tokens: list[int]) -> Logits:
                time.sleep(0.002)
                return usual(tokens)

            runner.logits_of = slowly
            if how == "cancel":
                task = asyncio.ensure_future(chat(model, ask(), "1"))
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                chunks = await chat_stream(model, ask(stream=True), "1")
                if how == "close":
                    await anext(chunks)
                    await chunks.aclose()
                del chunks  # "drop": nobody has read a chunk
            # `scripted` waits until the engine has nothing to do, and checks it.

    run(work())


def test_abort_by_id_ends_the_answer() -> None:
    async def work() -> list[ChatCompletionChunk]:
        async with scripted("ab" * 100) as model:
            chunks = await chat_stream(model, ask(stream=True, request_id="mine"), "other")
            got = [await anext(chunks)]
            model.abort("mine")
            return got + [chunk async for chunk in chunks]

    chunks = run(work())
    assert {chunk.id for chunk in chunks} == {"chatcmpl-mine"}
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len(text_of(chunks)) < 200


def test_any_settings_are_answered_or_refused_as_the_users_mistake() -> None:
    draw = random.Random(5)

    async def work() -> int:
        num_answered = 0
        async with scripted("abc") as model:
            for number in range(300):
                fields = random_fields(draw, ChatCompletionRequest)
                try:
                    request = ask(**{**fields, "max_tokens": 4, "stream": None})
                    await chat(model, request, str(number))
                    num_answered += 1
                except (RequestError, OptionError, ValidationError):
                    continue
        return num_answered

    assert run(work()) > 10
