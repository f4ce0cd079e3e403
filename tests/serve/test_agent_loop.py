"""Agents with two tools, by the official client, against models that write each format."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from agents import (
    ADD,
    END,
    TEMPLATE,
    TOKENIZER,
    TOOLS,
    WEATHER,
    agent_model,
    agent_server,
    ask,
    replies_of,
    run_agent,
    run_tool,
)
from small_tokenizers import CHATML_TEMPLATE
from tool_replies import BAITS

from mlc_llm import AsyncMLCEngine
from mlc_llm.engine.grammar_masks import SequenceGrammar
from mlc_llm.errors import RequestError
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.text.tool_calls.registry import format_names, get_format
from mlc_llm.text.tool_calls.tools import WrittenCall

QUESTION = [{"role": "user", "content": "How are things?"}]


@pytest.mark.parametrize("name", format_names())
def test_agent_calls_two_tools_and_answers(name: str) -> None:
    with agent_server(name, replies_of(name)) as (client, runner):
        for stream in (False, True):
            for choice in ("auto", "required"):
                if choice == "required":
                    message, reason = ask(
                        client, QUESTION, stream=stream, tools=TOOLS, tool_choice="required"
                    )
                    assert reason == "tool_calls" and not message.get("content")
                    [call] = message["tool_calls"]
                    assert json.loads(call["function"]["arguments"]) == {"city": 'Paris "x"'}
                    continue
                runner.prompts.clear()
                asked, first, told, second, summed, last = run_agent(client, "Hi", stream=stream)
                assert asked["role"] == "user"
                assert first["tool_calls"][0]["function"] == {
                    "name": "get_weather",
                    "arguments": WEATHER.arguments,
                }
                assert not first.get("content")
                assert (told["content"], summed["content"]) == ('sunny in Paris "x"', "3")
                assert second["tool_calls"][0]["function"]["name"] == "add"
                assert last["content"] == "It is sunny, and 3."
                assert len({c["tool_calls"][0]["id"] for c in (first, second)}) == 2
                # The tools, the calls and the results are in the prompts.
                assert '"name": "get_weather"' in runner.prompts[0]
                history = 'get_weather{"city": "Paris \\"x\\""}<result>sunny in Paris "x"'
                assert history in runner.prompts[1]
                assert 'add{"a": 1, "b": 2}<result>3' in runner.prompts[2]
        # Where calls are enforced, there may be several, or there is to be one.
        both = get_format(name).shape.write([WEATHER, ADD])
        runner.replies[0] = [*TOKENIZER.encode(both), END]
        for parallel, names in ((True, ["get_weather", "add"]), (False, ["get_weather"])):
            message, reason = ask(
                client,
                QUESTION,
                stream=True,
                tools=TOOLS,
                tool_choice="required",
                parallel_tool_calls=parallel,
            )
            assert [call["function"]["name"] for call in message["tool_calls"]] == names
            assert reason == "tool_calls" and not message.get("content")


def test_parallel_calls_and_their_limit() -> None:
    reply = "Wait.\n" + get_format("hermes").shape.write([WEATHER, ADD]) + "\nDone."
    with agent_server("hermes", [reply, "ok"]) as (client, _):
        for stream in (False, True):
            message, reason = ask(client, QUESTION, stream=stream, tools=TOOLS)
            assert [call["function"]["name"] for call in message["tool_calls"]] == [
                "get_weather",
                "add",
            ]
            assert (message["content"], reason) == ("Wait.\nDone.", "tool_calls")
            message, reason = ask(
                client, QUESTION, stream=stream, tools=TOOLS, parallel_tool_calls=False
            )
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
            assert (message["content"], reason) == ("Wait.", "tool_calls")


def test_arguments_are_streamed_as_they_are_made() -> None:
    with agent_server("hermes", replies_of("hermes")) as (client, _):
        chunks = list(
            client.chat.completions.create(
                model="fake", messages=QUESTION, tools=TOOLS, stream=True, logprobs=True
            )
        )
        deltas = [chunk.choices[0].delta for chunk in chunks]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        first, *more = calls
        assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
        assert first.function.arguments == "" and first.id.startswith("call_")
        assert len(more) > 5 and all(call.index == 0 and call.id is None for call in more)
        assert "".join(call.function.arguments for call in more) == WEATHER.arguments
        assert not any(delta.content for delta in deltas)
        tokens = [
            t for c in chunks if (c.choices[0].logprobs) for t in c.choices[0].logprobs.content
        ]
        assert "".join(t.token for t in tokens).startswith("<tool_call>")


def test_engine_in_python_runs_the_loop_with_its_own_answers() -> None:
    with agent_model("mistral", replies_of("mistral")) as (model, _):
        model.worker.start()
        engine = AsyncMLCEngine.from_models(ServedModels(model), model.worker.stop)

        async def work() -> str | None:
            messages: list[Any] = list(QUESTION)
            while True:
                answer = await engine.chat.completions.create(messages=messages, tools=TOOLS)
                [choice] = answer.choices
                messages.append(choice.message)
                if choice.finish_reason != "tool_calls":
                    return str(choice.message.content)
                for call in choice.message.tool_calls:
                    result = run_tool(call.function.name, call.function.arguments)
                    told = {"role": "tool", "tool_call_id": call.id, "content": result}
                    messages.append(told)

        try:
            assert asyncio.run(work()) == "It is sunny, and 3."
        finally:
            engine.terminate()


def test_plain_answer_stays_plain_and_json_answer_too() -> None:
    for reply in ("It is sunny.", '{"answer": [1, 2]}', '```json\n{"name": "x"}\n```'):
        with agent_server("json", [reply]) as (client, _):
            for stream in (False, True):
                message, reason = ask(client, QUESTION, stream=stream, tools=TOOLS)
                assert (message["content"], reason) == (reply, "stop")
                assert "tool_calls" not in message


def test_choice_none_and_no_tools_leave_calls_as_text() -> None:
    reply = replies_of("hermes")[0]
    with agent_server("hermes", [reply]) as (client, runner):
        for fields in ({"tools": TOOLS, "tool_choice": "none"}, {}):
            message, reason = ask(client, QUESTION, stream=False, **fields)
            assert reason == "stop" and "tool_calls" not in message
            assert '"arguments"' in message["content"]
        assert not any('"description"' in prompt for prompt in runner.prompts)


def test_named_choice_and_strict_tools_are_enforced_whatever_the_model_says() -> None:
    bad = get_format("hermes").shape.write([WrittenCall("get_weather", '{"town": 1}')])
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    named: Any = {"type": "function", "function": {"name": "add"}}
    with agent_server("hermes", [bad]) as (client, _):
        for stream in (False, True):
            message, _ = ask(client, QUESTION, stream=stream, tools=strict, max_tokens=200)
            for call in message.get("tool_calls", []):
                arguments = call["function"]["arguments"]
                assert arguments.startswith('{"city": "'), arguments
            message, reason = ask(
                client, QUESTION, stream=False, tools=TOOLS, tool_choice=named, max_tokens=300
            )
            if reason == "tool_calls":
                [call] = message["tool_calls"]
                assert call["function"]["name"] == "add"
                assert set(json.loads(call["function"]["arguments"])) == {"a", "b"}
            else:
                assert reason == "length"


def test_call_that_is_cut_is_text_and_in_a_stream_a_call_without_end() -> None:
    with agent_server("hermes", replies_of("hermes")) as (client, _):
        message, reason = ask(client, QUESTION, stream=False, tools=TOOLS, max_tokens=55)
        assert reason == "length" and message["content"].startswith('<tool_call>\n{"name"')
        message, reason = ask(client, QUESTION, stream=True, tools=TOOLS, max_tokens=55)
        assert reason == "length"
        assert WEATHER.arguments.startswith(message["tool_calls"][0]["function"]["arguments"])


def test_template_without_tools_runs_the_loop_in_plain_text() -> None:
    template = CHATML_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>")
    replies = replies_of("json")
    with agent_server("json", replies, template=template) as (client, runner):
        # Results come as the user's text, and count for the script.
        runner._result = []
        message, reason = ask(client, QUESTION, stream=False, tools=TOOLS)
        assert reason == "tool_calls"
        call = message["tool_calls"][0]
        history = [*QUESTION, message]
        history.append({"role": "tool", "tool_call_id": call["id"], "content": "<result>sunny"})
        ask(client, history, stream=False, tools=TOOLS)
        first, second = runner.prompts
        assert first.startswith("<|im_start|>system\nYou may call functions.")
        assert f"<|im_start|>assistant\n{replies[0]}<|im_end|>" in second
        assert "<|im_start|>user\nResult of get_weather: <result>sunny<|im_end|>" in second


def test_conversation_templates_take_tools_and_history() -> None:
    replies = replies_of("json")
    with agent_server("json", replies, template=None) as (client, runner):
        message, _ = ask(client, QUESTION, stream=True, tools=TOOLS)
        call = message["tool_calls"][0]
        history = [*QUESTION, {**message, "reasoning_content": "hm"}]
        history.append({"role": "tool", "tool_call_id": call["id"], "content": "<result>sunny"})
        message, _ = ask(client, history, stream=True, tools=TOOLS)
        assert message["tool_calls"][0]["function"]["name"] == "add"
        assert "hm" not in runner.prompts[-1]


THOUGHT = "<think>\nWell, {}.\n</think>\n\n"


def test_reasoning_is_apart_and_comes_back_with_history() -> None:
    replies = [THOUGHT + get_format("hermes").shape.write([WEATHER]), THOUGHT + "Sunny."]
    with agent_server("hermes", replies, reasoning="think") as (client, runner):
        for stream in (False, True):
            _, called, _, last = run_agent(client, "Hi", stream=stream)
            assert called["reasoning_content"] == last["reasoning_content"] == "Well, {}."
            assert last["content"] == "Sunny." and not called.get("content")
            assert '(Well, {}.)get_weather{"city"' in runner.prompts[-1]
        answer = client.chat.completions.create(model="fake", messages=QUESTION, tools=TOOLS)
        details = answer.usage.completion_tokens_details
        assert details.reasoning_tokens == len(TOKENIZER.encode("Well, {}."))
        for fields, content in (
            ({"separate_reasoning": False}, THOUGHT + "Sunny."),
            ({"include_reasoning": False}, "Sunny."),
        ):
            history = [{"role": "user", "content": "<result>"}]
            for stream in (False, True):
                message, _ = ask(client, history, stream=stream, extra_body=fields)
                assert message["content"] == content and "reasoning_content" not in message


def test_reasoning_that_the_prompt_begins_and_grammars_after_it() -> None:
    replies = ["Well.</think>" + get_format("hermes").shape.write([WEATHER])]
    with agent_server("hermes", replies, reasoning="think") as (client, runner):
        for stream in (False, True):
            message, reason = ask(
                client,
                QUESTION,
                stream=stream,
                tools=TOOLS,
                tool_choice="required",
                extra_body={"enable_thinking": True},
            )
            assert reason == "tool_calls" and message["reasoning_content"] == "Well."
            assert message["tool_calls"][0]["function"]["name"] == "get_weather"
        assert "<think>" not in runner.prompts[0]  # it comes behind what is cut off there
        message, _ = ask(client, QUESTION, stream=False, reasoning_effort="low")
        assert message["reasoning_content"] == "Well."


def test_response_format_holds_beside_tools() -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    replies = [get_format("hermes").shape.write([WEATHER]), '{"ok": true}']
    with agent_server("hermes", replies) as (client, _):
        messages = run_agent(client, "Hi", stream=True, response_format=wanted)
        assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
        assert json.loads(messages[-1]["content"]) == {"ok": True}


@pytest.mark.parametrize("stream", [False, True])
def test_other_formats_hold_on_the_final_channel(stream: bool) -> None:
    thought = "<|channel|>analysis<|message|>Hm: no.<|end|><|start|>assistant"
    reply = f"{thought}<|channel|>final<|message|>no way"
    with agent_server("gpt_oss", [reply], reasoning="auto") as (client, _):
        for wanted in (
            {"type": "choice", "choice": ["yes", "no"]},
            {"type": "regex", "regex": "n."},
        ):
            body = {"response_format": wanted}
            message, reason = ask(client, QUESTION, stream=stream, extra_body=body)
            assert (message["content"], reason) == ("no", "stop")
            assert message["reasoning_content"] == "Hm: no."
            with pytest.raises(openai.BadRequestError, match="leaves no room for calls") as caught:
                ask(client, QUESTION, stream=stream, extra_body=body, tools=TOOLS)
            assert caught.value.param == "response_format"


def test_what_fails_on_the_way_names_the_field_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(grammar: SequenceGrammar) -> None:
        raise RequestError("the grammar takes too much work at this place", "response_format")

    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}
    with agent_server("hermes", ["ok"]) as (client, _):
        monkeypatch.setattr(SequenceGrammar, "_check", fail)
        for fields, param in (
            ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
            ({"response_format": wanted}, "response_format"),
        ):
            for stream in (False, True):
                with pytest.raises(openai.APIError) as caught:
                    ask(client, QUESTION, stream=stream, **fields)
                assert caught.value.param == param
                prefix = "tools: " if param == "tools" else ""
                assert f"{prefix}the grammar takes too much work" in caught.value.message
        text: Any = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "null"}}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="fake", input="Hi", text=text)
        assert caught.value.param == "text.format"


def test_baits_come_out_as_they_went_in() -> None:
    for bait in BAITS[:8]:
        with agent_server("hermes", [bait]) as (client, _):
            message, reason = ask(client, QUESTION, stream=False, tools=TOOLS)
            assert (message["content"], reason) == (bait, "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS * 100}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters.type",
        ),
        (
            {
                "tools": [
                    TOOLS[0],
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {"properties": {"a": {"not": {}}}},
                        },
                    },
                ]
            },
            "tools[1].function.parameters",
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        (
            {"messages": [*QUESTION, {"role": "tool", "tool_call_id": "x", "content": "1"}]},
            "messages[1].tool_call_id",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_named(fields: dict[str, Any], param: str) -> None:
    template = TEMPLATE.replace("enable_thinking", "nothing")
    with agent_server("hermes", ["ok"], template=template) as (client, _):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "fake", "messages": QUESTION, **fields})
        assert caught.value.param == param
        # Others go on.
        message, _ = ask(client, QUESTION, stream=False, tools=TOOLS)
        assert message["content"] == "ok"
