"""Tools, calls and results in prompts: as each kind of template takes them, else as plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from small_tokenizers import CHATML_TEMPLATE

from mlc_llm.errors import RequestError
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.tool_calls.registry import get_format
from mlc_llm.text.tool_calls.tools import Tool
from mlc_llm.text.tool_prompt import Abilities, ToolPrompts

# The ways of real templates, each in few words.
HERMES = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", \
"arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>{% endfor %}"""
MISTRAL = """{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}\
[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]\
{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('length 9') }}\
{% endif %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS][\
{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('length 9') }}{% endif %}\
{{ c.function | tojson }}{% endfor %}]{% elif m.role == 'assistant' %}{{ m.content }}{% else %}\
{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"""
DEEPSEEK = """{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}\
{% for c in m.tool_calls %}{{ c.function.name + '```json' + c.function.arguments + '```' }}\
{% endfor %}{% else %}{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"""
PHI = """{% for m in messages %}{% if m.role == 'system' and m.tools is defined %}\
{{ m.content + '<|tool|>' + m.tools + '<|/tool|>' }}{% else %}\
{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"""
GEMMA = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}\
{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}\
{% endif %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>{% endfor %}"""

# Writes one call of a message, and refuses others or leaves them out.
ONE_CALL = """{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}\
{{ raise_exception('one at a time') }}{% endif %}[{{ m.content or '' }}]\
{{ m.tool_calls[0].function | tojson }}{% elif m.role == 'tool' %}<{{ m.content }}>{% else %}\
{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"""
FIRST_CALL = ONE_CALL.replace("{{ raise_exception('one at a time') }}", "")

ADD = Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "number"}}})
USER = {"role": "user", "content": "What is 1 + 2?"}


def asked(*arguments: str, content: str = "") -> dict[str, Any]:
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "add", "arguments": text}}
        for n, text in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def told(number: int, content: str = "3") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call_{number}"}


Loop = Callable[[str, str, Sequence[Mapping[str, Any]]], tuple[Abilities, str]]


@pytest.fixture
def render() -> Iterator[Loop]:
    """Return what renders messages with the tool by a template, for a format."""
    with ExitStack() as cleanup:

        def run(
            source: str, name: str, messages: Sequence[Mapping[str, Any]]
        ) -> tuple[Abilities, str]:
            template = ChatTemplate(source)
            cleanup.callback(template.close)
            prompts = ToolPrompts(
                get_format(name), source, lambda found, tools: template.render(found, tools=tools)
            )
            fitted = prompts.fit(messages, [ADD])
            text = template.render(fitted.with_bare(fitted.messages), tools=fitted.tools)
            return prompts.abilities, text

        yield run


def test_template_with_a_variable_gets_tools_and_arguments_as_objects(render: Loop) -> None:
    abilities, text = render(HERMES, "hermes", [USER, asked('{"a": 1}'), told(0)])
    assert abilities == Abilities("variable", "object", "", True, True)
    assert json.dumps(ADD.to_template()) in text
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text


def test_ids_are_fitted_to_templates_that_want_nine_characters(render: Loop) -> None:
    abilities, text = render(MISTRAL, "mistral", [USER, asked('{"a": 1}'), told(0), USER])
    assert abilities == Abilities("variable", "object", "", True, False)
    assert '[TOOL_CALLS][{"arguments": {"a": 1}, "name": "add"}]' in text or (
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]' in text
    )
    assert "[TOOL_RESULTS]3[/TOOL_RESULTS]" in text


def test_template_that_joins_texts_gets_texts_and_no_content(render: Loop) -> None:
    abilities, text = render(DEEPSEEK, "deepseek", [USER, asked('{"a": 1}'), told(0)])
    assert abilities == Abilities(None, "text", None, True, True)
    assert 'add```json{"a": 1}```tool:3' in text
    # It has no place for tools, so they are in the system message.
    assert text.startswith("system:You may call functions.")
    assert '{"name": "add", "description": "Adds."' in text
    assert "<\uff5ctool\u2581sep\uff5c>NAME\n```json\n{...}" in text


def test_template_may_take_tools_in_the_system_message(render: Loop) -> None:
    abilities, text = render(PHI, "phi", [USER, asked('{"a": 1}', content="Well."), told(0)])
    assert abilities == Abilities("message", None, "", False, True)
    assert text.startswith('<|tool|>[{"name": "add"')
    assert '<|assistant|>Well.\n<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]' in text
    assert text.endswith("<|user|>Result of add: 3")


@pytest.mark.parametrize("template", [ONE_CALL, FIRST_CALL])
def test_templates_of_one_call_get_several_apart(render: Loop, template: str) -> None:
    calls = asked('{"a": 1}', '{"a": 2}', '{"a": 3}', content="Well.")
    messages = [USER, calls, told(1, "is 2"), told(0, "is 1"), USER]
    abilities, text = render(template, "llama", messages)
    assert abilities == Abilities(None, "object", "", True, True, several=False)
    text = text.replace('{"arguments": {"a": ', "").replace('}, "name": "add"}', "")
    text = text.replace('{"name": "add", "arguments": {"a": ', "").replace("}}", "")
    question = "user:What is 1 + 2?"
    assert text.partition(question)[2] == f"[Well.]1<is 1>[]2<is 2>[]3{question}"


def test_template_without_tools_gets_them_as_text(render: Loop) -> None:
    system = {"role": "system", "content": "Be kind."}
    messages = [system, USER, asked('{"a": 1}', '{"a": 2}'), told(1, "4"), told(0)]
    abilities, text = render(CHATML_TEMPLATE, "json", messages)
    assert abilities == Abilities(None, None, "", False, True)
    assert text.startswith("<|im_start|>system\nBe kind.\n\nYou may call functions.")
    assert '{"name": "NAME", "arguments": {...}}' in text
    assert '{"name": "add", "arguments": {"a": 1}}\n{"name": "add", "arguments": {"a": 2}}' in text
    assert "<|im_start|>user\nResult of add: 4\nResult of add: 3<|im_end|>" in text


def test_template_without_system_messages_gets_them_from_the_user(render: Loop) -> None:
    abilities, text = render(GEMMA, "gemma", [USER, asked('{"a": 1}'), told(0)])
    assert not abilities.system
    assert text.startswith("<start_of_turn>user\nYou may call functions.")
    assert text.count("What is 1 + 2?") == 1


def test_nothing_changes_without_tools() -> None:
    prompts = ToolPrompts(get_format("hermes"), HERMES, lambda *_: pytest.fail("rendered"))
    messages = [USER, {"role": "assistant", "content": "3", "reasoning_content": "easy"}]
    fitted = prompts.fit(messages)
    assert (fitted.messages, fitted.tools, fitted.bare) == (messages, None, frozenset())


def test_templates_of_mlc_get_roles_and_contents_alone() -> None:
    prompts = ToolPrompts(get_format("json"), None, None)
    answer = {"role": "assistant", "content": "3", "reasoning_content": "easy"}
    fitted = prompts.fit([USER, asked('{"a": 1}'), told(0), answer], [ADD])
    assert [set(message) for message in fitted.messages] == [{"role", "content"}] * 5
    assert [message["role"] for message in fitted.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    nowhere = ToolPrompts(get_format("json"), None, None, has_system=False).fit([USER], [ADD])
    assert nowhere.messages[0]["role"] == "user" and len(nowhere.messages) == 1


def test_results_of_no_call_and_arguments_that_are_no_object_are_refused() -> None:
    prompts = ToolPrompts(get_format("json"), None, None)
    with pytest.raises(RequestError, match="call 'call_7', which no message") as caught:
        prompts.fit([USER, asked("{}"), told(7)])
    assert caught.value.param == "messages[2].tool_call_id"
    for arguments in ("[1]", '{"a":', "{} {}", '{"a":' * 100):
        with pytest.raises(RequestError, match="must be the text of a JSON object") as caught:
            prompts.fit([USER, asked("{}", arguments)])
        assert caught.value.param == "messages[1].tool_calls[1].function.arguments"


def test_history_with_long_numbers_is_taken(render: Loop) -> None:
    _, text = render(HERMES, "hermes", [USER, asked('{"a": ' + "9" * 5000 + "}")])
    assert '"arguments": {"a": Infinity}' in text
    fitted = ToolPrompts(get_format("hermes"), None, None).fit([USER, asked('{"a": 99}')])
    assert '{"a": 99}' in fitted.messages[1]["content"]
