"""Thoughts are told from answers, however the text is cut; templates are asked for them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlc_llm.errors import OptionError, RequestError
from mlc_llm.text.events import AnswerParser, CallStart, Content, Event, Reasoning, join_events
from mlc_llm.text.reasoning import (
    PlainParser,
    ReasoningParser,
    find_reasoning,
    reasoning_names,
    reasoning_variables,
    with_thoughts_by_name,
)
from mlc_llm.text.tool_calls.registry import get_format

THINK = "{{ '<think>' }}{{ '</think>' }}"


def parser(is_open: bool = False, inner: AnswerParser | None = None) -> ReasoningParser:
    form = find_reasoning("think", None)
    assert form is not None
    return ReasoningParser(form, inner or PlainParser(), is_open)


def parse(pieces: Any, is_open: bool = False) -> list[Event]:
    reader = parser(is_open)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return join_events([*events, *reader.finish()])


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("Hi.", False, [Content("Hi.")]),
        ("", False, []),
        ("  Hi. ", False, [Content("  Hi. ")]),
        ("<think>\nWell, a\n\nb.\n</think>\n\nHi. ", False, [Reasoning("Well, a\n\nb."), "Hi. "]),
        (" \n<think>a</think>b</think>c", False, [Reasoning("a"), Content("b</think>c")]),
        ("\na < b </thin </think>\nHi", True, [Reasoning("a < b </thin"), Content("Hi")]),
        ("<think>\na</think>Hi", True, [Reasoning("a"), Content("Hi")]),
        ("<thi", True, [Reasoning("<thi")]),
        ("<this>a</think>b", True, [Reasoning("<this>a"), Content("b")]),
        ("\n\n</think>\n\nHi", True, [Content("Hi")]),
        ("<think></think>", False, []),
        ("<think>never ends </th", False, [Reasoning("never ends </th")]),
        ("never ends", True, [Reasoning("never ends")]),
        ("<thin", False, [Content("<thin")]),
        ("A <think> tag</think>.", False, [Content("A <think> tag</think>.")]),
        (" " * 5000 + "x", False, [Content(" " * 5000 + "x")]),
    ],
)
def test_thoughts_are_told_apart_however_the_text_is_cut(
    text: str, is_open: bool, expected: list[Any]
) -> None:
    wanted = [Content(event) if isinstance(event, str) else event for event in expected]
    assert parse([text], is_open) == wanted
    assert parse(text, is_open) == wanted
    chance = random.Random(text)
    for _ in range(20):
        place = chance.randrange(len(text) + 1)
        assert parse([text[:place], text[place:]], is_open) == wanted


def test_what_follows_is_read_by_the_inner_parser() -> None:
    calls = get_format("hermes").open_parser({"now": {}}, new_id=lambda: "id")
    reader = parser(inner=calls)
    text = '<think>I <tool_call>{"name": "now"}</think><tool_call>{"name": "now"}</tool_call>'
    events = [event for char in text for event in reader.feed(char)] + reader.finish()
    assert join_events(events)[0] == Reasoning('I <tool_call>{"name": "now"}')
    assert [event for event in events if isinstance(event, CallStart)] == [
        CallStart(0, "id", "now")
    ]


def test_format_is_found_in_the_template_or_named() -> None:
    assert find_reasoning("auto", None) is None
    assert find_reasoning("auto", "{{ messages }}") is None
    found = find_reasoning("auto", THINK)
    assert found is not None and found.name == "think"
    assert found.is_open("<|im_start|>assistant\n<think>\n") and not found.is_open("<think> a")
    assert found.is_closed("<think>\n\n</think>\n\n") and not found.is_closed("<think>\n")
    assert find_reasoning("auto", "assistant\n<think>") == found
    assert find_reasoning("none", THINK) is None
    for name in reasoning_names():
        named = find_reasoning(name, None)
        assert named is not None and named.name == name
    with pytest.raises(OptionError, match="'x'; use one of auto, none, think, mistral, cohere"):
        find_reasoning("x", None)


QWEN = "{% if enable_thinking is defined and enable_thinking is false %}"
GPT_OSS = "{% if reasoning_effort is not defined %}{{ message.thinking }}"


@pytest.mark.parametrize(
    ("template", "effort", "enable", "expected"),
    [
        (QWEN, None, None, {}),
        (QWEN, "none", None, {"enable_thinking": False}),
        (QWEN, "low", None, {"enable_thinking": True}),
        (QWEN, None, False, {"enable_thinking": False}),
        (GPT_OSS, "low", None, {"reasoning_effort": "low"}),
        (QWEN + GPT_OSS, "none", False, {"enable_thinking": False}),
        ("{% if thinking %}", None, True, {"thinking": True}),
        ("", "none", False, {}),
        (None, None, False, {}),
    ],
)
def test_request_becomes_variables_of_the_template(
    template: str | None, effort: Any, enable: bool | None, expected: dict[str, Any]
) -> None:
    assert reasoning_variables(template, effort, enable) == expected


@pytest.mark.parametrize(
    ("template", "effort", "enable", "param"),
    [
        ("{{ 'reasoning_effort' }}", "high", None, "reasoning_effort"),
        (None, "low", None, "reasoning_effort"),
        ("{{ message.enable_thinking }}", None, True, "enable_thinking"),
        (QWEN, "none", True, "enable_thinking"),
    ],
)
def test_what_a_template_has_no_say_in_is_refused(
    template: str | None, effort: Any, enable: bool | None, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        reasoning_variables(template, effort, enable)
    assert caught.value.param == param


def test_thoughts_of_history_go_by_the_name_that_the_template_knows() -> None:
    message = {"role": "assistant", "reasoning_content": "a"}
    assert with_thoughts_by_name(QWEN, message) == message
    assert with_thoughts_by_name(GPT_OSS, message) == {**message, "thinking": "a"}
