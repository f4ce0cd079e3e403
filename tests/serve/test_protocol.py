"""Requests: every field is honoured, without effect, or refused by name; nothing breaks them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel, ValidationError
from random_requests import SPICE, random_value

from mlc_llm.errors import RequestError
from mlc_llm.serve.errors import field_error
from mlc_llm.serve.protocol.chat import ChatCompletionRequest
from mlc_llm.serve.protocol.completions import CompletionRequest
from mlc_llm.serve.protocol.messages import template_messages

MESSAGES = [{"role": "user", "content": "hello"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hello", **fields})


def refusal(kind: type[BaseModel], fields: dict[str, Any]) -> RequestError:
    """Return what a server tells of fields that are not accepted."""
    try:
        kind.model_validate(fields)
    except RequestError as error:
        return error
    except ValidationError as error:
        return field_error(error, fields)
    raise AssertionError(f"{fields} was accepted")


def test_every_field_of_openai_is_known() -> None:
    theirs = set(chat_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert theirs <= set(ChatCompletionRequest.model_fields)
    theirs = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert theirs <= set(CompletionRequest.model_fields)


def test_null_is_as_good_as_nothing() -> None:
    nothing = dict.fromkeys(set(ChatCompletionRequest.model_fields) - {"messages"})
    request = chat(**nothing)
    assert (request.num_choices, request.max_new_tokens, request.num_logprobs) == (1, None, None)
    nothing = dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt", "add_special_tokens"})
    assert completion(**nothing).max_new_tokens == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "k"},
        {"store": False, "service_tier": "default", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [FUNCTION], "tool_choice": "none", "parallel_tool_calls": False},
        {"tools": [FUNCTION], "tool_choice": NAMED, "parallel_tool_calls": None},
        {"reasoning_effort": "high", "enable_thinking": True, "separate_reasoning": False},
        {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"keep_alive": "5m", "cache_prompt": True, "skip_special_tokens": True},
        {"debug_config": {"grammar_execution_mode": "jump_forward"}},
    ],
)
def test_harmless_fields_are_taken(fields: dict[str, Any]) -> None:
    request = chat(**fields)
    assert request.model_fields_set == {"messages", *fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "f g"}}]},
        {"tools": [{"type": "function", "function": {"name": "f" * 65}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        {"tools": [FUNCTION] * 129},
        {"tool_choice": NAMED},
        {"tool_choice": "any"},
        {"parallel_tool_calls": 1},
        {"reasoning_effort": "much"},
        {"functions": [{"name": "f"}]},
        {"tool_choice": "required"},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "a"}},
        {"prediction": {"type": "content", "content": ""}},
        {"web_search_options": {}},
        {"verbosity": "low"},
        {"moderation": {"model": "m"}},
        {"store": True},
        {"store": 0},
        {"service_tier": "flex"},
        {"guided_json": {}},
        {"chat_template": "x"},
        {"use_beam_search": True},
        {"temprature": 1},
        {"best_of": 2},
        {"stream_options": {"include_usage": True}},
        {"top_logprobs": 2},
        {"logprobs": 3},
        {"n": 0},
        {"n": 129},
        {"n": 10**400},
        {"n": True},
        {"n": 1.5},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": True},
        {"temperature": "1"},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 10**400},
        {"top_p": 1.01},
        {"top_k": -2},
        {"min_p": -1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 2**63},
        {"max_completion_tokens": 0},
        {"min_tokens": -1},
        {"seed": 2**63},
        {"seed": 1.0},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"stop": ["a" * 1025]},
        {"stop": [1]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [1] * 257},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1" * 5000: 1}},
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"5": True}},
        {"logit_bias": {str(token): 1 for token in range(1025)}},
        {"logit_bias": [1]},
        {"priority": 1.5},
        {"cache_salt": "a" * 257},
        {"request_id": "two words"},
        {"request_id": "a" * 129},
        {"debug_config": {"pinned_system_prompt": True}},
        {"debug_config": {"special_request": "query_engine_metrics"}},
        {"chat_template_kwargs": {str(number): 1 for number in range(65)}},
        {"chat_template_kwargs": []},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_other_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    [name] = fields
    error = refusal(ChatCompletionRequest, {"messages": MESSAGES, **fields})
    assert error.param is not None and error.param.split(".")[0].split("[")[0] == name
    assert name in str(error)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ([], "messages"),
        ([123], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": 123, "content": "a"}], "messages[0].role"),
        ([{"role": "function", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": "a", "colour": 1}], "messages[0].colour"),
        ([*MESSAGES, {"role": "user", "content": [{"type": "video_url", "video_url": {}}]}],
         "messages[1].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "a", "tool_calls": [
            {"function": {"name": "f", "arguments": ""}}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a", "tool_call_id": "1"}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "content": "a", "function_call": {}}],
         "messages[0].function_call"),
        (MESSAGES * 4097, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_wrong_messages_are_named_by_place(messages: Any, param: str) -> None:
    fields = {"messages": messages}
    try:
        template_messages(ChatCompletionRequest.model_validate(fields).messages)
    except RequestError as error:
        assert error.param == param
    except ValidationError as error:
        assert field_error(error, fields).param == param
    else:
        raise AssertionError("the messages were accepted")


def test_answers_of_clients_are_messages_again() -> None:
    answer = {
        "role": "assistant",
        "content": "Hi.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    request = chat(messages=[*MESSAGES, answer, {"role": "user", "content": "", "name": "Eve"}])
    assert template_messages(request.messages)[1:] == [
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "", "name": "Eve"},
    ]


def test_two_limits_must_agree() -> None:
    assert chat(max_tokens=3, max_completion_tokens=3).max_new_tokens == 3
    error = refusal(
        ChatCompletionRequest, {"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}
    )
    assert error.param == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": [10**400]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({}, "prompt"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_wrong_completion_requests_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, fields).param == param


def test_prompts_are_taken_in_all_four_shapes() -> None:
    assert completion(prompt="a").prompts == ["a"]
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts == [[1], [2, 3]]


def test_schemas_describe_the_fields() -> None:
    schema = ChatCompletionRequest.model_json_schema()
    assert set(schema["properties"]) == set(ChatCompletionRequest.model_fields)
    assert schema["required"] == ["messages"]
    assert schema["additionalProperties"] is False
    assert "Without effect" in schema["properties"]["user"]["description"]
    assert len(CompletionRequest.model_json_schema()["properties"]["prompt"]["anyOf"]) == 4


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_any_values_are_taken_or_refused_as_the_users_mistake(kind: type[BaseModel]) -> None:
    draw = random.Random(3)
    base = {"messages": MESSAGES} if kind is ChatCompletionRequest else {"prompt": "a"}
    num_taken = 0
    for name in sorted(kind.model_fields):
        values = [*SPICE, *(random_value(draw) for _ in range(40))]
        for value in values:
            fields = {**base, name: value}
            try:
                request = kind.model_validate(fields)
            except RequestError as error:
                assert error.param is not None
            except ValidationError as error:
                assert field_error(error, fields).param is not None
            else:
                num_taken += 1
                if isinstance(request, ChatCompletionRequest):
                    read_messages(request)
    assert num_taken > 100


def read_messages(request: ChatCompletionRequest) -> None:
    try:
        template_messages(request.messages)
    except RequestError as error:
        assert error.param is not None and error.param.startswith("messages[")
