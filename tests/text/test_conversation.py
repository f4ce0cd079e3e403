"""Named conversation templates: their text, their JSON, and telling them from Jinja sources."""

import dataclasses
import json
import re
from typing import Any

import pytest
import small_tokenizers

from mlc_llm.errors import CorruptFile, OptionError, RequestError
from mlc_llm.text.chat_template import ChatTemplate
from mlc_llm.text.conversation import (
    Conversation,
    conversation_names,
    detect_conversation,
    get_conversation,
)
from mlc_llm.text.stop import StopFilter

SYSTEM = {"role": "system", "content": "S"}
TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
LLAMA3_JINJA = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
TINYLLAMA_JINJA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + "
    "message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ '<|system|>\n' + "
    "message['content'] + eos_token }}{% else %}{{ '<|assistant|>\n' + message['content'] + "
    "eos_token }}{% endif %}{% endfor %}{{ '<|assistant|>\n' }}"
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
            "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama-2",
            "[INST] <<SYS>>\nS\n<</SYS>>\n\none [/INST] two </s><s>[INST] three [/INST] ",
        ),
        (
            "llama-3",
            "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral_default", "[INST] Sone [/INST] two [INST] three [/INST]"),
        ("dolly", "S### Instruction:\none\n\n### Response:\ntwo### End\n"
         "### Instruction:\nthree\n\n### Response:\n"),
        ("deepseek", "SUser: one\n\nAssistant: two<｜end▁of▁sentence｜>User: three\n\nAssistant:"),  # noqa: RUF001
        ("ministral3", "[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]one[/INST]two</s>[INST]three[/INST]"),
        ("LM", "Sonetwothree"),
        ("orion", "SHuman: one\n\nAssistant: two</s>Human: three\n\nAssistant: </s>"),
        (
            "gorilla",
            "SUSER: <<question>> one <<function>> \nASSISTANT: two</s>"
            "USER: <<question>> three <<function>> \nASSISTANT:",
        ),
    ],
)  # fmt: skip
def test_layout_of_named_templates(name: str, expected: str) -> None:
    assert get_conversation(name).render([SYSTEM, *TURNS]) == expected


def test_default_system_message_is_used_without_one() -> None:
    conversation = get_conversation("chatml")
    assert conversation.system_message
    text = conversation.render(TURNS[:1])
    assert text.startswith(f"<|im_start|>system\n{conversation.system_message}<|im_end|>\n")
    assert get_conversation("chatml_nosystem").render(TURNS[:1]).startswith("<|im_start|>user\none")


def test_first_role_is_kept_where_there_is_no_system_text() -> None:
    conversation = get_conversation("llava")
    assert conversation.render(TURNS[:1]) == "USER: one ASSISTANT:"
    assert conversation.render([SYSTEM, *TURNS[:1]]) == "Sone ASSISTANT:"


def test_functions_go_into_the_last_place_for_them() -> None:
    conversation = dataclasses.replace(
        get_conversation("gorilla"), use_function_calling=True, function_string="[F]"
    )
    turns = [*TURNS[:2], {"role": "user", "content": "{function_string}?"}]
    assert conversation.render([SYSTEM, *turns]) == (
        "SUSER: <<question>> one <<function>> \nASSISTANT: two</s>"
        "USER: <<question>> {function_string}? <<function>> [F]\nASSISTANT:"
    )


def test_contents_are_never_taken_for_placeholders() -> None:
    turns = [{"role": "user", "content": "{user_message}{system_message}{assistant_message}"}]
    system = {"role": "system", "content": "{user_message}"}
    assert get_conversation("LM").render([system, *turns]) == (
        "{user_message}{user_message}{system_message}{assistant_message}"
    )


def test_examples_of_the_template_come_before_the_messages() -> None:
    conversation = Conversation.from_json(
        {"name": "x", "roles": {"user": "U", "assistant": "A"}, "role_content_sep": ":",
         "messages": [["user", "a"], ["assistant", "b"]], "seps": ["|", "#"]},
        "config",
    )  # fmt: skip
    assert conversation.render([SYSTEM, *TURNS[:1]]) == "SU:a|A:b#U:one|A"


def test_thoughts_are_left_out_of_the_history() -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"}, TURNS[2]]
    assert "assistant\ntwo<|im_end|>" in get_conversation("qwen3").render(turns)
    assert "hm" in get_conversation("qwen2").render(turns)


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("chatml", [TURNS[0], SYSTEM], "message 1 is a system message"),
        ("chatml", [{"role": "tool", "content": "x"}], "'tool'.*roles system, user, assistant"),
        ("llama-4", [SYSTEM, *TURNS], "no place for a system message"),
    ],
)
def test_messages_the_template_cannot_take(
    name: str, messages: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        get_conversation(name).render(messages)


@pytest.mark.parametrize("name", conversation_names())
def test_every_named_template(name: str) -> None:
    conversation = get_conversation(name)
    assert conversation.name == name
    assert len(conversation.seps) in (1, 2)
    assert {"user", "assistant"} <= set(conversation.roles) <= {"user", "assistant", "tool"}
    assert conversation.stop_token_ids or conversation.stop_str
    assert all(token_id >= 0 for token_id in conversation.system_prefix_token_ids)
    text = conversation.render(TURNS)
    assert text.index("one") < text.index("two") < text.index("three")
    assert not re.search(r"\{\w+\}", text)
    stream = StopFilter(conversation.stop_str)
    assert stream.put("A plain answer.") + stream.finish() == "A plain answer."
    stored = json.loads(json.dumps(conversation.to_json()))
    assert Conversation.from_json(stored, "config") == conversation


def test_all_names_are_there() -> None:
    names = conversation_names()
    assert len(names) == 53
    assert {"aya-23", "llama-3_1", "phi-4", "qwen3_5_nothink", "LM", "wizard_coder_or_math"} < set(
        names
    )


def test_template_object_as_mlc_llm_writes_it() -> None:
    stored = {
        "name": "mine",
        "system_template": "<{system_message}>",
        "system_message": "",
        "system_prefix_token_ids": None,
        "add_role_after_system_message": True,
        "roles": {"user": "u", "assistant": "a", "tool": "t"},
        "role_templates": {"tool": "({tool_message})"},
        "messages": [],
        "seps": [";"],
        "role_content_sep": "=",
        "role_empty_sep": "=",
        "stop_str": ["."],
        "stop_token_ids": [7],
        "function_string": "",
        "use_function_calling": False,
        "some_later_field": 1,
    }
    conversation = Conversation.from_json(stored, "config")
    assert conversation.render([TURNS[0], {"role": "tool", "content": "r"}]) == "<>u=one;t=(r);a="
    assert (conversation.system_prefix_token_ids, conversation.stop_token_ids) == ([], [7])


def test_a_lone_name_stands_for_the_named_template() -> None:
    assert Conversation.from_json({"name": "llama-2"}, "config") == get_conversation("llama-2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("roles", "user"),
        ("roles", {"user": 1}),
        ("seps", []),
        ("seps", ["a", "b", "c"]),
        ("stop_token_ids", ["2"]),
        ("stop_str", "</s>"),
        ("messages", [["user"]]),
        ("system_message", 3),
        ("add_role_after_system_message", "no"),
    ],
)
def test_damaged_template_object_is_a_corrupt_file(field: str, value: Any) -> None:
    with pytest.raises(CorruptFile, match=f"here.*{field}"):
        Conversation.from_json({"name": "x", field: value}, "here")


def test_unknown_name_lists_names_like_it() -> None:
    with pytest.raises(OptionError, match=r"'llama_4'; use one of llama-4.* and 45 more.*auto"):
        get_conversation("llama_4")
    with pytest.raises(OptionError, match=r"''; use one of .*45 more"):
        get_conversation("")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (small_tokenizers.CHATML_TEMPLATE, "chatml"),
        (small_tokenizers.CHATML_TEMPLATE + "{% if enable_thinking %}{% endif %}", "qwen3"),
        ("{{ '<|im_start|>system\\nYou are Qwen' }}", "qwen2"),
        ("{{ '<|im_start|>' }}{{ '<|im_sep|>' }}", None),
        (LLAMA3_JINJA, "llama-3"),
        (LLAMA3_JINJA + "{# role ipython #}", "llama-3_1"),
        (TINYLLAMA_JINJA, "tinyllama_v1_0"),
        ("{{ '[INST] <<SYS>>\\n' }}", "llama-2"),
        ("{{ '[INST] ' + message['content'] + ' [/INST]' }}", "mistral_default"),
        ("{{ '<start_of_turn>' + role + '\n' }}", "gemma_instruction"),
        ("{{ '<|user|>' + '\n' + message['content'] + '<|end|>' }}", "phi-3"),
        ("{{ '<\uff5cUser\uff5c>' + message['content'] }}", "deepseek_v3"),
        ("{{ messages[0].content }}", None),
        ("", None),
    ],
)
def test_named_template_is_told_from_the_jinja_source(source: str, name: str | None) -> None:
    assert detect_conversation(source) == name


@pytest.mark.parametrize("source", [small_tokenizers.CHATML_TEMPLATE, LLAMA3_JINJA])
def test_told_template_lays_text_out_as_the_jinja_source_does(source: str) -> None:
    name = detect_conversation(source)
    assert name is not None
    template = ChatTemplate(source, {"eos_token": "</s>"})
    try:
        assert get_conversation(name).render([SYSTEM, *TURNS]) == template.render([SYSTEM, *TURNS])
    finally:
        template.close()
