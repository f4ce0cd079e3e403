"""Agents with two tools, written as users write them, with the official clients of both APIs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from acting import NAME, call, served_actor
from live_server import LiveServer
from openai_shapes import unknown_fields
from pydantic import BaseModel

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
SUM = {
    "type": "object",
    "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": ("Tells the weather.", WEATHER), "add": ("Adds two numbers.", SUM)}
QUESTION = "How warm is it in Paris and in Rome together?"
ANSWER = "Together it is 39 degrees, é ☃."
FORCED = "Call a tool!"  # with which the model says nothing else
FORMED = "Answer in JSON!"
PLAIN = "Do not think!"
THOUGHT = "I look both up, then I add."


def script(prompt: str) -> str:
    """Return what the model says: two calls at once, then another, then its answer."""
    if PLAIN in prompt:
        return "Hello."
    space = "" if FORCED in prompt or FORMED in prompt else "\n\n"
    return f"<think>\n{THOUGHT}\n</think>{space}{answer_to(prompt)}"


def answer_to(prompt: str) -> str:
    if FORMED in prompt:
        return '{"city": "Rome", "days": 3}'
    results = prompt.count("<|im_start|>tool\n")
    if "# Tools" not in prompt:
        return "Hello."
    if results == 0:
        calls = [call("get_weather", f'{{"city": "{city}"}}') for city in ("Paris", "Rome")]
        return ("" if FORCED in prompt else "I look.\n") + "\n".join(calls)
    assert THOUGHT in prompt and "I look." in prompt
    assert prompt.count("<tool_call>") == (2 if results == 2 else 3)
    if results == 2:
        assert "<|im_start|>tool\n18<" in prompt and "<|im_start|>tool\n21<" in prompt
        return call("add", '{"a": 18, "b": 21}')
    assert "<|im_start|>tool\n39.0<" in prompt
    return ANSWER


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    if name == "add":
        return str(float(arguments["a"] + arguments["b"]))
    return {"Paris": "18", "Rome": "21"}[arguments["city"]]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with served_actor(script) as live:
        yield live


@pytest.fixture(scope="module")
def gpt(server: LiveServer) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


FUNCTIONS: list[Any] = [
    {"type": "function", "name": name, "description": text, "parameters": schema, "strict": True}
    for name, (text, schema) in SCHEMAS.items()
]
TOOLS: list[Any] = [
    {"name": name, "description": text, "input_schema": schema}
    for name, (text, schema) in SCHEMAS.items()
]


def respond(client: openai.OpenAI, streams: bool, conversation: list[Any], **fields: Any) -> Any:
    fields = {"model": NAME, "input": conversation, "tools": FUNCTIONS, **fields}
    if not streams:
        response = client.responses.create(**fields)
    else:
        with client.responses.stream(**fields) as stream:
            for event in stream:
                assert not [name for name in unknown_fields(event) if name != "snapshot"]
            response = stream.get_final_response()
    assert not unknown_fields(response)
    return response


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_of_responses(gpt: openai.OpenAI, streams: bool) -> None:
    conversation: list[Any] = [{"role": "user", "content": QUESTION}]
    turns = []
    while True:
        response = respond(gpt, streams, conversation)
        assert response.status == "completed"
        turns.append([item.type for item in response.output])
        conversation += response.output
        assert len(turns) < 9
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        for item in calls:
            output = run_tool(item.name, json.loads(item.arguments))
            result = {"type": "function_call_output", "call_id": item.call_id, "output": output}
            conversation.append(result)
    assert turns == [
        ["reasoning", "message", "function_call", "function_call"],
        ["reasoning", "function_call"],
        ["reasoning", "message"],
    ]
    assert response.output_text == ANSWER
    assert conversation[1].content[0].text == THOUGHT


def ask(client: anthropic.Anthropic, streams: bool, messages: list[Any], **fields: Any) -> Any:
    fields = {"model": NAME, "messages": messages, "tools": TOOLS, "max_tokens": 500, **fields}
    if not streams:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_of_messages(claude: anthropic.Anthropic, streams: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    turns = []
    while True:
        message = ask(claude, streams, messages)
        turns.append([block.type for block in message.content])
        messages.append({"role": "assistant", "content": message.content})
        assert len(turns) < 9
        if message.stop_reason != "tool_use":
            break
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": run_tool(block.name, block.input),
            }
            for block in message.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert turns == [
        ["thinking", "text", "tool_use", "tool_use"],
        ["thinking", "tool_use"],
        ["thinking", "text"],
    ]
    assert message.stop_reason == "end_turn"
    assert message.content[1].text == ANSWER
    assert messages[1]["content"][0].thinking == THOUGHT


def test_the_clients_own_loop(claude: anthropic.Anthropic) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Tells the weather."""
        return run_tool("get_weather", {"city": city})

    @anthropic.beta_tool
    def add(a: float, b: float) -> str:
        """Adds two numbers."""
        return run_tool("add", {"a": a, "b": b})

    runner = claude.beta.messages.tool_runner(
        model=NAME,
        max_tokens=500,
        tools=[get_weather, add],
        messages=[{"role": "user", "content": QUESTION}],
        thread=False,
    )
    _, block = runner.until_done().content
    assert block.type == "text" and block.text == ANSWER


@pytest.mark.parametrize("streams", [False, True])
def test_tools_may_be_forbidden_or_asked_for(
    gpt: openai.OpenAI, claude: anthropic.Anthropic, streams: bool
) -> None:
    question: list[Any] = [{"role": "user", "content": QUESTION}]
    response = respond(gpt, streams, question, tool_choice="none")
    assert response.output_text == "Hello."
    message = ask(claude, streams, question, tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["thinking", "text"]

    response = respond(gpt, streams, question, parallel_tool_calls=False)
    kinds = [item.type for item in response.output]
    assert kinds.count("function_call") == 1 and not response.parallel_tool_calls
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask(claude, streams, question, tool_choice=choice)
    assert [block.type for block in message.content].count("tool_use") == 1
    assert message.stop_reason == "tool_use"

    question = [{"role": "user", "content": FORCED}]
    response = respond(gpt, streams, question, tool_choice="required")
    assert [item.type for item in response.output][-1] == "function_call"
    message = ask(claude, streams, question, tool_choice={"type": "any"})
    assert message.stop_reason == "tool_use"


NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize("streams", [False, True])
def test_a_named_tool_is_called_whatever_the_model_would_say(
    gpt: openai.OpenAI, claude: anthropic.Anthropic, streams: bool
) -> None:
    question: list[Any] = [{"role": "user", "content": "What time is it?"}]
    function = {"type": "function", "name": "now", "parameters": NOW, "strict": True}
    choice: dict[str, Any] = {"type": "function", "name": "now"}
    off: Any = {"effort": "none"}
    response = respond(gpt, streams, question, tools=[function], tool_choice=choice, reasoning=off)
    [item] = response.output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "now", {})
    assert response.tool_choice.name == "now"
    message = ask(
        claude,
        streams,
        question,
        tools=[{"name": "now", "input_schema": NOW}],
        tool_choice={"type": "tool", "name": "now"},
        thinking={"type": "disabled"},
    )
    [block] = message.content
    assert (block.type, block.name, block.input) == ("tool_use", "now", {})


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int


@pytest.mark.parametrize("streams", [False, True])
def test_text_of_a_schema(gpt: openai.OpenAI, claude: anthropic.Anthropic, streams: bool) -> None:
    question: list[Any] = [{"role": "user", "content": FORMED}]
    parsed = gpt.responses.parse(model=NAME, input=question, text_format=Trip)
    assert parsed.output_parsed == Trip(city="Rome", days=3)
    schema = {**Trip.model_json_schema(), "additionalProperties": False}
    form = {"type": "json_schema", "name": "trip", "schema": schema, "strict": True}
    response = respond(gpt, streams, question, tools=[], text={"format": form})
    assert Trip.model_validate_json(response.output_text) == parsed.output_parsed
    assert [item.type for item in response.output] == ["reasoning", "message"]
    response = respond(gpt, streams, question, tools=[], text={"format": {"type": "json_object"}})
    assert json.loads(response.output_text) == {"city": "Rome", "days": 3}
    form = {"type": "json_schema", "schema": schema}
    message = ask(claude, streams, question, tools=[], output_config={"format": form})
    assert Trip.model_validate_json(message.content[1].text) == parsed.output_parsed


def test_schemas_that_cannot_be_enforced(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    question: list[Any] = [{"role": "user", "content": FORMED}]
    wrong: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        form: Any = {"type": "json_schema", "name": "n", "schema": wrong}
        gpt.responses.create(model=NAME, input=question, text={"format": form})
    assert refused.value.param is not None and refused.value.param.startswith("text.format")
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format"):
        form = {"type": "json_schema", "schema": wrong}
        ask(claude, False, question, tools=[], output_config={"format": form})


@pytest.mark.parametrize("streams", [False, True])
def test_a_beginning_is_gone_on_with(claude: anthropic.Anthropic, streams: bool) -> None:
    question: list[Any] = [{"role": "user", "content": PLAIN}]
    messages = [*question, {"role": "assistant", "content": "Hel"}]
    message = ask(claude, streams, messages, tools=[])
    assert [block.text for block in message.content] == ["lo."]


def test_thoughts_may_be_switched_off(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    question: list[Any] = [{"role": "user", "content": PLAIN}]
    off: Any = {"effort": "none"}
    response = respond(gpt, False, question, tools=[], reasoning=off)
    assert (response.output_text, response.reasoning.effort) == ("Hello.", "none")
    with_thoughts = claude.messages.count_tokens(model=NAME, messages=question)
    without = claude.messages.count_tokens(
        model=NAME, messages=question, thinking={"type": "disabled"}
    )
    assert without.input_tokens > with_thoughts.input_tokens  # by the empty thoughts
    message = ask(claude, False, question, tools=[], thinking={"type": "disabled"})
    assert [block.type for block in message.content] == ["text"]


def test_images_are_refused_by_models_that_do_not_see(
    gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.BadRequestError, match="image") as refused:
        part: Any = {"type": "input_image", "image_url": "data:image/png;base64,QUJD"}
        gpt.responses.create(model=NAME, input=[{"role": "user", "content": [part]}])
    assert refused.value.param == "input"
    source: Any = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        content = [{"type": "image", "source": source}]
        ask(claude, False, [{"role": "user", "content": content}], tools=[])


def test_a_call_that_is_cut(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    question: list[Any] = [{"role": "user", "content": QUESTION}]
    whole = ask(claude, False, question)
    num_tokens = whole.usage.output_tokens - 17  # in the second call's arguments
    message = ask(claude, True, question, max_tokens=num_tokens)
    assert message.stop_reason == "max_tokens"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[2].input == {"city": "Paris"} and message.content[3].input == {}
    events = list(
        gpt.responses.create(
            model=NAME,
            input=question,
            tools=FUNCTIONS,
            max_output_tokens=num_tokens,
            stream=True,
        )
    )
    last = events[-1]
    assert last.type == "response.incomplete"
    statuses = [item.status for item in last.response.output]  # type: ignore[union-attr]
    assert statuses == ["completed", "completed", "completed", "incomplete"]
    assert last.response.usage is not None
    assert last.response.usage.output_tokens_details.reasoning_tokens > 10


def test_tools_and_tokens(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    plain = claude.messages.count_tokens(model=NAME, messages=messages).input_tokens
    counted = claude.messages.count_tokens(model=NAME, messages=messages, tools=TOOLS).input_tokens
    assert counted > plain
    usage = ask(claude, False, messages).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    response = respond(gpt, False, messages)
    assert response.usage.input_tokens == counted


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/responses", {"tools": [*FUNCTIONS, FUNCTIONS[0]]}, "tools[2]"),
        ("/v1/responses", {"tools": [{**FUNCTIONS[0], "name": "a b"}]}, "tools[0].name"),
        (
            "/v1/responses",
            {"tools": [{**FUNCTIONS[0], "parameters": {"type": "array"}}]},
            "tools[0].parameters.type",
        ),
        ("/v1/responses", {"tool_choice": {"type": "function", "name": "no"}}, "tool_choice"),
        ("/v1/responses", {"tools": [], "tool_choice": "required"}, "tool_choice"),
        ("/v1/responses", {"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ("/v1/messages", {"tools": [*TOOLS, TOOLS[0]]}, "tools[2]"),
        (
            "/v1/messages",
            {"tools": [{**TOOLS[0], "input_schema": {"type": "array"}}]},
            "tools[0].input_schema.type",
        ),
        ("/v1/messages", {"tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
        ("/v1/messages", {"output_config": {"effort": "extreme"}}, "output_config.effort"),
    ],
    ids=str,
)
def test_what_is_wrong_with_tools_is_named(
    gpt: openai.OpenAI, path: str, fields: dict[str, Any], name: str
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body: dict[str, Any] = {"tools": FUNCTIONS, "input": messages}
    if path == "/v1/messages":
        body = {"tools": TOOLS, "messages": messages, "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="400") as refused:
        gpt.post(path.removeprefix("/v1"), body={**body, **fields}, cast_to=object)
    assert name in refused.value.message
