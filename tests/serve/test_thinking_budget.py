"""Budgets of thoughts over HTTP: a model that never stops thinking answers all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from agents import END, START, TEMPLATE, TOKENIZER, TOOLS, VOCAB_SIZE, agent_server, ask
from fakes import Logits

from mlc_llm.text.tool_calls.registry import get_format
from mlc_llm.text.tool_calls.tools import WrittenCall

QUESTION: list[Any] = [{"role": "user", "content": "Hi"}]
CALL = get_format("hermes").shape.write([WrittenCall("get_weather", '{"city": "Rome"}')])
# Lets the model begin its thoughts itself.
OWN = TEMPLATE.replace("enable_thinking", "nothing")
# Puts empty thoughts into the prompt of those who want none, as that of Qwen3 does.
HYBRID = TEMPLATE.replace(
    "{% if enable_thinking %}", "{% if not enable_thinking %}<think>\n\n</think>\n\n{% else %}"
)


def thinker(answer: str) -> Any:
    """Return logits of a model that thinks without end, and answers where its thoughts are over."""

    def logits_of(tokens: list[int]) -> Logits:
        logits = np.zeros(VOCAB_SIZE, np.float32)
        said = tokens[len(tokens) - tokens[::-1].index(START) :] if START in tokens else []
        text = TOKENIZER.decode(said, skip_special_tokens=False)
        _, mark, rest = text.partition("</think>")
        begin, spoken = "<think>", rest.lstrip("\n")
        if mark and rest in ("", "\n"):
            word = "\n"
        elif mark:
            word = answer[len(spoken) :] if answer.startswith(spoken) else ""
        else:
            word = "w" if text.startswith(begin) else begin[len(text) :]
        token = TOKENIZER.encode(word)[0] if word else END
        logits[token] = 30
        return logits

    return logits_of


@contextmanager
def thinking_server(answer: str, template: str = TEMPLATE) -> Iterator[tuple[Any, Any]]:
    """Serve such a model; return the clients of OpenAI and Anthropic."""
    with agent_server("hermes", ["unused"], template=template, reasoning="think") as (gpt, runner):
        runner.logits_of = thinker(answer)
        address = str(gpt.base_url).removesuffix("/v1/")
        with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as claude:
            yield gpt, claude


@pytest.mark.parametrize("template", [TEMPLATE, OWN, HYBRID])
@pytest.mark.parametrize("stream", [False, True])
def test_chats_have_a_budget(template: str, stream: bool) -> None:
    with thinking_server("Sunny.", template) as (client, _):
        for budget in (1, 20):
            body = {"thinking_token_budget": budget}
            message, reason = ask(client, QUESTION, stream=stream, extra_body=body)
            assert message["reasoning_content"] == "w" * budget
            assert (message["content"], reason) == ("Sunny.", "stop")
        body = {"thinking_token_budget": 0}
        message, reason = ask(client, QUESTION, stream=stream, extra_body=body)
        assert not message.get("reasoning_content")
        assert (message["content"], reason) == ("Sunny.", "stop")
        # Without a budget it thinks as long as it may.
        body = {} if template == OWN else {"enable_thinking": True}
        message, reason = ask(client, QUESTION, stream=stream, max_tokens=60, extra_body=body)
        assert reason == "length" and not message["content"]


@pytest.mark.parametrize("logprobs", [False, True])
def test_what_is_enforced_begins_after_forced_ends_and_line_breaks(logprobs: bool) -> None:
    schema = {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with thinking_server('{"ok": true}') as (client, _):
        answer = client.chat.completions.create(
            model="fake",
            messages=QUESTION,
            response_format=wanted,
            logprobs=logprobs,
            extra_body={"thinking_token_budget": 5},
        )
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("wwwww", '{"ok": true}')
        assert answer.usage.completion_tokens_details.reasoning_tokens == 5
        if logprobs:
            tokens = [token.token for token in answer.choices[0].logprobs.content]
            assert "".join(tokens).endswith('wwwww\n</think>\n\n{"ok": true}')
    with thinking_server(CALL) as (client, _):
        message, reason = ask(
            client,
            QUESTION,
            stream=False,
            tools=TOOLS,
            tool_choice="required",
            logprobs=logprobs,
            extra_body={"thinking_token_budget": 5},
        )
        assert reason == "tool_calls" and message["reasoning_content"] == "wwwww"
        assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


def test_what_is_enforced_begins_at_once_where_the_prompt_ends_the_thoughts() -> None:
    wanted: Any = {"type": "choice", "choice": ["yes", "no"]}
    with thinking_server("yes", HYBRID) as (client, _):
        for fields in ({"enable_thinking": False}, {"thinking_token_budget": 0}):
            body = {**fields, "response_format": wanted}
            answer = client.chat.completions.create(
                model="fake", messages=QUESTION, logprobs=True, extra_body=body
            )
            tokens = [token.token for token in answer.choices[0].logprobs.content]
            assert "".join(tokens) == answer.choices[0].message.content == "yes"


@pytest.mark.parametrize("template", [TEMPLATE, OWN])
def test_messages_of_anthropic_have_one(template: str) -> None:
    with thinking_server("Sunny.", template) as (_, client):
        thinking: Any = {"type": "enabled", "budget_tokens": 9}
        fields: dict[str, Any] = {"model": "fake", "messages": QUESTION, "max_tokens": 50}
        message = client.messages.create(**fields, thinking=thinking)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking == "w" * 9
        assert (message.content[1].text, message.stop_reason) == ("Sunny.", "end_turn")
        with client.messages.stream(**fields, thinking=thinking) as events:
            assert events.get_final_message().content[0].thinking == "w" * 9
        count = client.messages.count_tokens(model="fake", messages=QUESTION, thinking=thinking)
        assert count.input_tokens == message.usage.input_tokens


def test_budgets_are_refused_where_nothing_marks_thoughts() -> None:
    with agent_server("hermes", ["ok"], template=OWN) as (client, _):
        with pytest.raises(openai.BadRequestError, match="nothing marks") as caught:
            ask(client, QUESTION, stream=False, extra_body={"thinking_token_budget": 5})
        assert caught.value.param == "thinking_token_budget"
        for value in (-1, "5", True, 1.5):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, QUESTION, stream=False, extra_body={"thinking_token_budget": value})
            assert caught.value.param == "thinking_token_budget"
        body = {"model": "fake", "messages": QUESTION, "max_tokens": 50}
        address = str(client.base_url).removesuffix("/v1/")
        with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as claude:
            with pytest.raises(anthropic.BadRequestError, match=r"thinking\.budget_tokens is 9"):
                claude.messages.create(**body, thinking={"type": "enabled", "budget_tokens": 9})
        assert json.dumps(ask(client, QUESTION, stream=False)[0]["content"]) == '"ok"'
