"""`response_format` in Python programs: the fields of the server, and its refusals."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mlc_llm.api import AsyncMLCEngine, MLCEngine
from mlc_llm.errors import RequestError

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["north", "south"]}, "far": {"type": "boolean"}},
    "required": ["place", "far"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "where", "schema": SCHEMA}}


def check(text: str | None) -> None:
    value = json.loads(text or "")
    assert value["place"] in ("north", "south") and value["far"] in (True, False)


def test_a_sync_engine_keeps_to_a_schema(engine: MLCEngine) -> None:
    fields: dict[str, Any] = {"response_format": FORMAT, "max_tokens": 60, "seed": 1}
    for seed in range(3):
        answer = engine.chat.completions.create(messages=HELLO, **{**fields, "seed": seed})
        check(answer.choices[0].message.content)
    check(engine.completions.create(prompt="hello", **fields).choices[0].text)
    stream = engine.chat.completions.create(messages=HELLO, stream=True, **fields)
    check("".join(c.choices[0].delta.content or "" for c in stream if c.choices))


def test_an_async_engine_keeps_to_formats_beside_free_answers(
    async_engine: AsyncMLCEngine,
) -> None:
    async def ask(response_format: Any) -> str | None:
        create = async_engine.chat.completions.create
        answer = await create(messages=HELLO, max_tokens=40, response_format=response_format)
        text: str | None = answer.choices[0].message.content
        return text

    async def ask_all() -> list[str | None]:
        choice = {"type": "choice", "choice": ["one", "two"]}
        return await asyncio.gather(ask(FORMAT), ask(choice), ask(None), ask({"type": "text"}))

    schema, choice, *free = asyncio.run(ask_all())
    check(schema)
    assert choice in ("one", "two")
    assert all(text is not None and len(text) == 40 for text in free)


@pytest.mark.parametrize("depth", [100, 10_000])
def test_what_cannot_be_enforced_is_refused(engine: MLCEngine, depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    deep = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    for bad in (deep, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"if": {}}}}):
        with pytest.raises(RequestError):
            engine.chat.completions.create(messages=HELLO, response_format=bad)
    answer = engine.chat.completions.create(messages=HELLO, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
