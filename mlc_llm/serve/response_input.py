"""From a request for a response to the chat request that asks the model the same."""

from __future__ import annotations

import re
from typing import Any

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.chat import ChatCompletionRequest
from mlc_llm.serve.protocol.responses import (
    Content,
    FunctionCallItem,
    FunctionCallOutputItem,
    ImagePart,
    InputPart,
    ReasoningItem,
    RefusalPart,
    ResponseRequest,
    ResponseTextFormat,
)
from mlc_llm.serve.transcript import Names, Transcript, read_chat_request

# What fields of a chat are called here.
OUR_NAMES: Names = (
    (re.compile(r"^max_(completion_)?tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^reasoning_effort"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\]|tool_choice)\.function"), r"\1"),
    (re.compile(r"^messages.*"), "input"),
)


def chat_request_of(request: ResponseRequest) -> ChatCompletionRequest:
    """Return the same request as one for a chat.

    Raises RequestError for what chats do not take, by the names that it has there.
    """
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": _messages_of(request),
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": _tools_of(request),
        "tool_choice": _choice_of(request),
        "parallel_tool_calls": request.parallel_tool_calls,
        "stream": request.stream,
    }
    if request.text is not None and request.text.format is not None:
        fields["response_format"] = _format_of(request.text.format)
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    return read_chat_request(fields)


def _messages_of(request: ResponseRequest) -> list[dict[str, Any]]:
    transcript = Transcript()
    if isinstance(request.input, str):
        transcript.say("user", request.input)
    for item in () if isinstance(request.input, str) else request.input:
        if isinstance(item, FunctionCallItem):
            transcript.call(item.call_id, item.name, item.arguments)
        elif isinstance(item, FunctionCallOutputItem):
            transcript.give_result(item.call_id, _content_of(item.output))
        elif isinstance(item, ReasoningItem):
            # Without content, the item holds thoughts that only its server can read.
            if item.content:
                transcript.think("".join(part.text for part in item.content))
        elif item.role == "assistant":
            transcript.answer(_text_of(item.content))
        else:
            role = "user" if item.role == "user" else "system"
            read = _content_of if role == "user" else _text_of
            transcript.say(role, read(item.content))
    return _with_instructions(transcript.messages, request.instructions)


def _with_instructions(
    messages: list[dict[str, Any]], instructions: str | None
) -> list[dict[str, Any]]:
    """Return the messages with one of the system before them, which many templates allow only."""
    texts = [] if instructions is None else [instructions]
    num_first = 0
    while num_first < len(messages) and messages[num_first]["role"] == "system":
        texts.append(messages[num_first]["content"])
        num_first += 1
    if not texts:
        return messages
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages[num_first:]]


def _content_of(content: Content) -> Any:
    """Return text, or the parts of a chat message where there are images."""
    if isinstance(content, str) or not any(isinstance(part, ImagePart) for part in content):
        return _text_of(content)
    return [_part_of(part) for part in content]


def _part_of(part: InputPart | ImagePart | RefusalPart) -> dict[str, Any]:
    if not isinstance(part, ImagePart):
        return {"type": "text", "text": _text_of([part])}
    image = {"url": part.image_url}
    if part.detail is not None:
        image["detail"] = part.detail
    return {"type": "image_url", "image_url": image}


def _text_of(content: Content) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, ImagePart):
            raise RequestError("images belong to messages of the user and to outputs", "input")
        texts.append(part.text if isinstance(part, InputPart) else part.refusal)
    return "".join(texts)


def _tools_of(request: ResponseRequest) -> list[dict[str, Any]] | None:
    if request.tools is None:
        return None
    return [
        {
            "type": "function",
            "function": tool.model_dump(
                include={"name", "description", "parameters", "strict"}, exclude_none=True
            ),
        }
        for tool in request.tools
    ]


def _choice_of(request: ResponseRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    return {"type": "function", "function": {"name": choice.name}}


def _format_of(form: ResponseTextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    given = {
        "name": form.name or "response",
        "schema": form.schema_,
        "strict": form.strict,
        "description": form.description,
    }
    named = {name: value for name, value in given.items() if value is not None}
    return {"type": "json_schema", "json_schema": named}
