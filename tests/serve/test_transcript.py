"""What agent protocols say, as the messages of a chat; and errors by the names of each protocol."""

from __future__ import annotations

from typing import Any

import pytest

from mlc_llm.errors import RequestError
from mlc_llm.serve import anthropic_input, response_input
from mlc_llm.serve.protocol.anthropic import MessagesRequest
from mlc_llm.serve.protocol.chat import ChatCompletionRequest
from mlc_llm.serve.protocol.responses import ResponseRequest
from mlc_llm.serve.transcript import Transcript, renamed_fields


def of_response(**fields: Any) -> ChatCompletionRequest:
    request = ResponseRequest.model_validate(fields)
    return response_input.chat_request_of(request)


def of_messages(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    request = MessagesRequest.model_validate({"messages": messages, "max_tokens": 9, **fields})
    return anthropic_input.chat_request_of(request)


def plain(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_none=True) for message in request.messages]


def called(identifier: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def test_an_answer_is_one_message() -> None:
    transcript = Transcript()
    transcript.think("hm")
    transcript.answer("I look.")
    transcript.call("1", "f", "{}")
    transcript.call("2", "g", "{}")
    transcript.answer("And wait.")
    transcript.give_result("1", "one")
    transcript.answer("So.")
    transcript.answer("Again.")
    transcript.think("hm")
    transcript.think("well")
    first, result, so, again, last = transcript.messages
    assert first["reasoning_content"] == "hm"
    assert first["content"] == "I look.\n\nAnd wait."
    assert [call["id"] for call in first["tool_calls"]] == ["1", "2"]
    assert result == {"role": "tool", "tool_call_id": "1", "content": "one"}
    assert (so["content"], again["content"]) == ("So.", "Again.")
    assert last == {"role": "assistant", "content": None, "reasoning_content": "hm\nwell"}


def test_items_of_a_response() -> None:
    request = of_response(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "What "}] * 2},
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "id": "msg_1",
                "content": [{"type": "output_text", "text": "One.", "annotations": []}],
            },
            {"role": "user", "content": "And?"},
        ],
        max_output_tokens=5,
        temperature=0.5,
    )
    assert plain(request) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "What What "},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "tool_calls": [called("c1", "f", "{}")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And?"},
    ]
    assert (request.max_new_tokens, request.temperature) == (5, 0.5)
    assert plain(of_response(input="hi")) == [{"role": "user", "content": "hi"}]


def test_blocks_of_messages() -> None:
    request = of_messages(
        {"role": "user", "content": "What?"},
        {"role": "user", "content": [{"type": "text", "text": "Now?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "é"}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "!"}],
                },
                {"type": "text", "text": "Go on."},
            ],
        },
        system=[{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}] * 2,
        stop_sequences=["x"],
        top_k=3,
    )
    assert plain(request) == [
        {"role": "system", "content": "Be\nBe"},
        {"role": "user", "content": "What?\nNow?"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "I look.",
            "tool_calls": [called("t1", "f", '{"a": "é"}'), called("t2", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no\n!"},
        {"role": "user", "content": "Go on."},
    ]
    assert (request.stop_texts, request.top_k, request.max_new_tokens) == (("x",), 3, 9)
    assert not request.continue_final_message


def test_the_beginning_of_an_answer_is_gone_on_with() -> None:
    user = {"role": "user", "content": "What?"}
    request = of_messages(user, {"role": "assistant", "content": "It "})
    assert request.continue_final_message
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    for content in ([call], "", []):
        with pytest.raises(RequestError, match="no text to go on with"):
            of_messages(user, {"role": "assistant", "content": content})


def test_images_are_parts_of_a_chat() -> None:
    address = "data:image/png;base64,QUJD"
    part = {"type": "image_url", "image_url": {"url": address}}
    picture = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": address}]
    expected = [{"type": "text", "text": "a"}, part]
    request = of_response(input=[{"role": "user", "content": picture}])
    assert plain(request)[0]["content"] == expected
    data = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    blocks = [{"type": "text", "text": "a"}, {"type": "image", "source": data}]
    assert plain(of_messages({"role": "user", "content": blocks}))[0]["content"] == expected
    for source in ({"type": "url"}, {"type": "base64", "data": "QUJD"}):
        with pytest.raises(RequestError, match="source"):
            of_messages({"role": "user", "content": [{"type": "image", "source": source}]})


@pytest.mark.parametrize(
    ("names", "theirs", "ours"),
    [
        (response_input.OUR_NAMES, "max_tokens", "max_output_tokens"),
        (response_input.OUR_NAMES, "tools[1].function.parameters", "tools[1].parameters"),
        (response_input.OUR_NAMES, "response_format.json_schema.schema", "text.format.schema"),
        (response_input.OUR_NAMES, "messages[3].content", "input"),
        (response_input.OUR_NAMES, "top_p", "top_p"),
        (anthropic_input.OUR_NAMES, "tools[1].function.parameters.a", "tools[1].input_schema.a"),
        (anthropic_input.OUR_NAMES, "stop", "stop_sequences"),
        (anthropic_input.OUR_NAMES, "reasoning_effort", "output_config.effort"),
        (anthropic_input.OUR_NAMES, None, None),
    ],
)
def test_errors_name_the_fields_of_the_protocol(names: Any, theirs: Any, ours: Any) -> None:
    with pytest.raises(RequestError, match="is too much") as raised, renamed_fields(names):
        raise RequestError(f"{theirs} is too much", theirs)
    assert raised.value.param == ours
    assert str(raised.value) == f"{ours} is too much"
