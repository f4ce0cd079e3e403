"""Parsers of tool calls: every format's replies, however they are cut; baits; random damage."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from tool_replies import BAITS, REPLIES, TOOLS, Reply

from mlc_llm.errors import OptionError
from mlc_llm.text.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    join_events,
)
from mlc_llm.text.tool_calls.registry import detect_format, format_names, get_format
from mlc_llm.text.tool_calls.tools import WrittenCall

CASES = [(name, reply) for name, replies in REPLIES.items() for reply in replies]
# Marks after which the formats' readers are in some place of their own.
PIECES = ['{"', "name", '": "', "get_weather", '", "', "arguments", "{}", "}", "]", "[", "\\", "\n"]
PIECES += ['"', ":", ",", "(", ")", "=", "'", "```", "\ud83d\ude00", "\u2603", "0", "null", "<"]


def parse(name: str, pieces: Iterable[str], holds_calls: bool = True) -> list[Event]:
    parser = get_format(name).open_parser(TOOLS, holds_calls=holds_calls, new_id=lambda: "id")
    events = [event for piece in pieces for event in parser.feed(piece)]
    return join_events([*events, *parser.finish()])


def cut(text: str, chance: random.Random) -> list[str]:
    """Return a text in random pieces, some of them empty."""
    places = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def content_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def calls_of(events: Iterable[Event]) -> list[tuple[str, str]]:
    names = [event.name for event in events if isinstance(event, CallStart)]
    texts = [""] * len(names)
    for event in events:
        if isinstance(event, CallArguments):
            texts[event.index] += event.text
    return list(zip(names, texts, strict=True))


@pytest.mark.parametrize(("name", "reply"), CASES)
@pytest.mark.parametrize("holds_calls", [True, False])
def test_reply_means_the_same_however_it_is_cut(name: str, reply: Reply, holds_calls: bool) -> None:
    whole = parse(name, [reply.text], holds_calls)
    assert content_of(whole) == reply.content
    assert [(called, json.loads(text)) for called, text in calls_of(whole)] == list(reply.calls)
    assert [e.index for e in whole if isinstance(e, CallEnd)] == list(range(len(reply.calls)))
    assert "".join(e.text for e in whole if isinstance(e, Reasoning)) == reply.reasoning
    assert parse(name, reply.text, holds_calls) == whole
    chance = random.Random(reply.text)
    for _ in range(20):
        assert parse(name, cut(reply.text, chance), holds_calls) == whole


def test_every_format_is_in_the_table_of_replies() -> None:
    assert set(REPLIES) == set(format_names())
    assert all(any(reply.calls for reply in replies) for replies in REPLIES.values())


def test_arguments_come_as_they_are_written() -> None:
    parser = get_format("hermes").open_parser(TOOLS)
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris'
    *_, start, arguments = parser.feed(text)
    assert isinstance(start, CallStart) and start.name == "get_weather"
    assert start.id.startswith("call_") and len(start.id) == 29
    assert arguments == CallArguments(0, '{"city": "Paris')
    assert parser.feed('"') == [CallArguments(0, '"')]
    assert parser.feed("}}") == [CallArguments(0, "}"), CallEnd(0)]
    assert parser.feed("</tool_call>") == parser.finish() == []


def test_held_call_that_breaks_off_is_content_and_one_that_was_told_of_stays() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Par'
    assert parse("hermes", [text]) == [Content(text)]
    told = parse("hermes", [text], holds_calls=False)
    assert calls_of(told) == [("get_weather", '{"city": "Par')]
    assert not any(isinstance(event, CallEnd) for event in told)


@pytest.mark.parametrize("name", format_names())
def test_bait_is_content(name: str) -> None:
    for bait in BAITS:
        for text in (bait, f"Well: {bait} and more"):
            events = parse(name, text)
            if name == "gpt_oss" and "<|" in text:
                continue  # channels of its own, tested below
            assert events == [Content(text)], (name, text)
            told = parse(name, text, holds_calls=False)
            assert not any(isinstance(event, CallEnd) for event in told), (name, text)


def test_broken_channels_become_content() -> None:
    for text, expected in (
        ("<|channel|>analysis", "<|channel|>analysis"),
        ("<|channel|>commentary to=functions.x<|message|>{}", "{}"),
        ("<|channel|>final<|message|>a<|message|>b", "a<|message|>b"),
        ("<|start|>" * 300, "<|start|>" * 300),
        (
            "<|channel|>commentary to=functions.now<|message|>[]<|call|>",
            "<|channel|>commentary to=functions.now<|message|>[]",
        ),
        ("a<|end|><|start|>assistant<|channel|>final<|message|>b", "ab"),
    ):
        events = parse("gpt_oss", text)
        assert events == [Content(expected)]
        assert parse("gpt_oss", [text]) == events


@pytest.mark.parametrize("name", format_names())
def test_damaged_replies_never_raise_nor_lose_text(name: str) -> None:
    chance = random.Random(name)
    sources = [reply.text for reply in REPLIES[name]] + BAITS
    for _ in range(200):
        text = chance.choice(sources)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(text) + 1)
            kind = chance.randrange(4)
            if kind == 0:
                text = text[:place] + text[place + chance.randrange(1, 4) :]
            elif kind == 1:
                text = text[:place] + chance.choice(PIECES) + text[place:]
            elif kind == 2:
                other = chance.choice(sources)
                text = text[:place] + other[chance.randrange(len(other)) :]
            else:
                text = text[:place] + text[place : place + 20] * 2 + text[place + 20 :]
        pieces = cut(text, chance)
        held = parse(name, pieces)
        assert parse(name, text) == held
        told = parse(name, pieces, holds_calls=False)
        assert parse(name, text, holds_calls=False) == told
        for called, arguments in calls_of(held):
            assert called in TOOLS
            assert isinstance(json.loads(arguments), dict)
        if not calls_of(held) and name != "gpt_oss":
            assert content_of(held) == text


@pytest.mark.parametrize("name", format_names())
def test_work_is_linear_in_the_text(name: str) -> None:
    """Counts calls of functions, on texts that begin calls over and over or never end one."""
    form = get_format(name)
    call = form.shape.write([WrittenCall("get_weather", '{"city": "Paris"}')])
    units = [
        call,
        call[:-2],
        call[:12],
        '{"',
        "[",
        '{"a":',
        "<tool_call>{",
        "```",
        "<|channel|>",
        " ",
    ]

    def num_operations(text: str) -> int:
        count = 0

        def count_one(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(count_one)
        try:
            parse(name, [text])
        finally:
            sys.setprofile(None)
        return count

    for unit in units:
        for head in ("", form.shape.open + form.shape.begin):
            short, long = (num_operations(head + unit * (n // len(unit))) for n in (500, 4000))
            # Squared, the longer one would take 64 times as many.
            assert long < 12 * short + 1000


def test_names_come_from_the_template_or_the_family() -> None:
    for template, expected in (
        ("{{ '<|channel|>' }}{{ '<|message|>' }}", "gpt_oss"),
        ("<\uff5ctool\u2581sep\uff5c> ```json", "deepseek"),
        ("<\uff5ctool\u2581sep\uff5c>", "deepseek_v31"),
        ("[TOOL_CALLS] [ARGS]", "mistral_args"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<tool_call> <function=", "qwen_xml"),
        ("<tool_call>NAME <arg_key>", "glm_tags"),
        ("<tool_call>", "hermes"),
        ("<|python_tag|>", "llama"),
        ("<|tool|>", "phi"),
        ("<start_of_turn>", "gemma"),
        ("<|im_start|>", "json"),
    ):
        assert detect_format(template, "llama").name == expected
    assert detect_format(None, "qwen3").name == "hermes"
    assert detect_format(None, "glm4_moe").name == "glm_tags"
    assert detect_format(None, "gpt2").name == "json"
    with pytest.raises(OptionError, match=r"'x'; use auto or one of gpt_oss, .*, json"):
        get_format("x")


def test_ids_of_mistral_have_nine_letters_and_digits() -> None:
    form = get_format("mistral")
    parser = form.open_parser(TOOLS)
    [start, *_] = parser.feed("[TOOL_CALLS]now[ARGS]{}")
    assert isinstance(start, CallStart)
    assert len(start.id) == 9 and start.id.isalnum()
    assert form.fit_id(start.id) == start.id
    assert form.fit_id("call_1") == form.fit_id("call_1") != form.fit_id("call_2")
    assert len(form.fit_id("call_1")) == 9
    assert get_format("hermes").fit_id("call_1") == "call_1"


def test_answer_has_at_most_so_many_calls() -> None:
    events: list[Any] = parse("hermes", ['<tool_call>{"name": "now"}</tool_call>' * 200])
    assert len(calls_of(events)) == 128
    assert content_of(events).count("<tool_call>") == 72
