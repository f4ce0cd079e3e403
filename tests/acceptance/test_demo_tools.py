"""Tools with the demo model, which was never taught them: the official client gets valid calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from demo_model import place_demo_model
from program import Program
from running_server import MODEL, RunningServer, running_server

pytestmark = [pytest.mark.cpu, pytest.mark.weights]

NUM_SEEDS = 100
MAX_TOKENS = 72  # more than the longest call has
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 16},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "add": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 999},
            "b": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris, and 1 + 2?"}]


@pytest.fixture(scope="module")
def server(program: Program, demo_gguf: Path) -> Iterator[RunningServer]:
    place_demo_model(program, demo_gguf)
    with running_server(
        program, "--mode", "server", "--overrides", "max_num_sequence=16"
    ) as running:
        yield running


def check_call(call: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a call that is valid."""
    assert call.type == "function" and call.id
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, SCHEMAS[call.function.name])
    return call.function.name, arguments


async def ask_with_seed(client: openai.AsyncOpenAI, seed: int) -> Any:
    """Return an answer that calls a tool; every other one is streamed."""
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": MAX_TOKENS,
    }
    if seed % 2:
        async with client.chat.completions.stream(**fields) as stream:
            return await stream.get_final_completion()
    return await client.chat.completions.create(**fields)


def test_required_gives_a_valid_call_with_every_seed(server: RunningServer) -> None:
    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(ask_with_seed(client, seed) for seed in range(NUM_SEEDS)))

    answers = asyncio.run(ask_all())
    assert len(answers) == NUM_SEEDS
    seen = set()
    for seed, answer in enumerate(answers):
        [choice] = answer.choices
        content = "" if seed % 2 else None  # a stream's first delta has text, if none
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", content)
        [call] = choice.message.tool_calls
        name, arguments = check_call(call)
        seen.add((name, json.dumps(arguments)))
    assert len(seen) > 10  # the seeds matter, the grammar leaves a choice


@pytest.mark.parametrize("stream", [False, True])
def test_loop_of_two_tools_in_messages(server: RunningServer, stream: bool) -> None:
    messages: list[Any] = list(QUESTION)
    tools: list[Any] = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    with anthropic.Anthropic(base_url=server.url, api_key="none", timeout=120) as client:
        for name in (None, *SCHEMAS):
            choice = {"type": "any"} if name is None else {"type": "tool", "name": name}
            fields: Any = {"model": MODEL, "messages": messages, "tools": tools}
            fields |= {"tool_choice": {**choice, "disable_parallel_tool_use": True}}
            fields["max_tokens"] = MAX_TOKENS
            if stream:
                with client.messages.stream(**fields) as events:
                    message = events.get_final_message()
            else:
                message = client.messages.create(**fields)
            [block] = message.content
            assert (message.stop_reason, block.type) == ("tool_use", "tool_use")
            assert name in (None, block.name)
            jsonschema.validate(block.input, SCHEMAS[block.name])
            messages.append({"role": "assistant", "content": message.content})
            told = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny, and 3"}
            messages.append({"role": "user", "content": [told]})
        last = client.messages.create(
            model=MODEL, messages=messages, tools=tools, tool_choice={"type": "none"}, max_tokens=16
        )
        assert [block.type for block in last.content] == ["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_loop_of_two_tools(server: RunningServer, stream: bool) -> None:
    messages = list(QUESTION)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:

        def ask(**fields: Any) -> Any:
            values = {"model": MODEL, "messages": messages, "temperature": 0, "tools": TOOLS}
            values |= {"max_tokens": MAX_TOKENS, **fields}
            if not stream:
                return client.chat.completions.create(**values).choices[0]
            with client.chat.completions.stream(**values) as chunks:
                return chunks.get_final_completion().choices[0]

        for name in SCHEMAS:
            named = {"type": "function", "function": {"name": name}}
            choice = ask(tool_choice=named)
            assert choice.finish_reason == "tool_calls"
            [call] = choice.message.tool_calls
            assert check_call(call)[0] == name
            messages.append(choice.message.model_dump(exclude_none=True, exclude={"parsed"}))
            for asked in messages[-1]["tool_calls"]:
                asked["function"].pop("parsed_arguments", None)
            result = "sunny" if name == "get_weather" else "3"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            tools=TOOLS,
            tool_choice="none",
            max_tokens=16,
            stream=True,
        )
        last = [chunk.choices[0] for chunk in chunks]
        assert "".join(choice.delta.content or "" for choice in last)
        assert not any(choice.delta.tool_calls for choice in last)
        assert last[-1].finish_reason in ("stop", "length")
