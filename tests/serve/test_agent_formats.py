"""The loop of an agent with two tools in OpenAI's responses and Anthropic's messages, by their
official clients, against models that write each format. Chats are in test_agent_loop.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from agents import TOOLS, ScriptedRunner, agent_server, replies_of, run_tool
from anthropic import Anthropic
from openai import OpenAI

from mlc_llm.text.tool_calls.registry import format_names

ANSWER = "It is sunny, and 3."
CALLS = [("get_weather", {"city": 'Paris "x"'}), ("add", {"a": 1, "b": 2})]
FUNCTIONS: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
BLOCK_TOOLS: list[Any] = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}
    for tool in TOOLS
]


def respond(client: OpenAI, streams: bool, conversation: list[Any], choice: str) -> list[Any]:
    """Return the items of a response."""
    fields: Any = {"model": "fake", "input": conversation, "tools": FUNCTIONS}
    fields["tool_choice"] = choice
    if not streams:
        return list(client.responses.create(**fields).output)
    with client.responses.stream(**fields) as stream:
        arguments: dict[str, str] = {}
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                arguments[event.item_id] = arguments.get(event.item_id, "") + event.delta
        items = list(stream.get_final_response().output)
    told = {item.id: item.arguments for item in items if item.type == "function_call"}
    assert arguments == told
    return items


def ask(client: Anthropic, streams: bool, messages: list[Any], choice: str) -> Any:
    """Return a message."""
    fields: Any = {"model": "fake", "messages": messages, "tools": BLOCK_TOOLS, "max_tokens": 500}
    fields["tool_choice"] = {"type": choice}
    if not streams:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        return stream.get_final_message()


def check_prompts(runner: ScriptedRunner) -> None:
    """Check that tools, calls and results have reached the prompts, and forget those."""
    first, second, third = runner.prompts
    assert '"name": "get_weather"' in first and '"name": "add"' in first
    history = 'get_weather{"city": "Paris \\"x\\""}<result>sunny in Paris "x"'
    assert history in second
    assert history in third and 'add{"a": 1, "b": 2}<result>3' in third
    runner.prompts.clear()


@pytest.mark.parametrize("name", format_names())
def test_loop_of_responses(name: str) -> None:
    with agent_server(name, replies_of(name)) as (client, runner):
        for streams in (False, True):
            conversation: list[Any] = [{"role": "user", "content": "Hi"}]
            made = []
            while len(made) <= len(CALLS):
                items = respond(client, streams, conversation, "auto")
                conversation += items
                calls = [item for item in items if item.type == "function_call"]
                if not calls:
                    break
                [item] = calls
                made.append((item.name, json.loads(item.arguments)))
                output = run_tool(item.name, item.arguments)
                told = {"type": "function_call_output", "call_id": item.call_id, "output": output}
                conversation.append(told)
            assert made == CALLS
            assert items[-1].content[0].text == ANSWER
            check_prompts(runner)
            [item] = respond(client, streams, conversation[:1], "required")[-1:]
            assert (item.type, item.name, json.loads(item.arguments)) == (
                "function_call",
                *CALLS[0],
            )
            runner.prompts.clear()


@contextmanager
def anthropic_client(beside: OpenAI) -> Iterator[Anthropic]:
    """Return a client of the other API for the same server."""
    url = str(beside.base_url).removesuffix("/v1/")
    with Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("name", format_names())
def test_loop_of_messages(name: str) -> None:
    with (
        agent_server(name, replies_of(name)) as (openai_client, runner),
        anthropic_client(openai_client) as client,
    ):
        for streams in (False, True):
            messages: list[Any] = [{"role": "user", "content": "Hi"}]
            made = []
            while len(made) <= len(CALLS):
                message = ask(client, streams, messages, "auto")
                messages.append({"role": "assistant", "content": message.content})
                blocks = [block for block in message.content if block.type == "tool_use"]
                assert (message.stop_reason == "tool_use") == bool(blocks)
                if not blocks:
                    break
                [block] = blocks
                made.append((block.name, block.input))
                result = run_tool(block.name, json.dumps(block.input))
                told = {"type": "tool_result", "tool_use_id": block.id, "content": result}
                messages.append({"role": "user", "content": [told]})
            assert made == CALLS
            assert (message.stop_reason, message.content[-1].text) == ("end_turn", ANSWER)
            check_prompts(runner)
            block = ask(client, streams, messages[:1], "any").content[-1]
            assert (block.type, block.name, block.input) == ("tool_use", *CALLS[0])
            runner.prompts.clear()
