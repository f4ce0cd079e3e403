"""From Anthropic's messages to the chat request that asks the model the same."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.anthropic import (
    CountTokensRequest,
    ImageBlock,
    ImageSource,
    Message,
    MessagesRequest,
    TextBlock,
    Texts,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from mlc_llm.serve.protocol.chat import ChatCompletionRequest
from mlc_llm.serve.transcript import Names, Transcript, read_chat_request

# What fields of a chat are called here.
OUR_NAMES: Names = (
    (re.compile(r"^max_(completion_)?tokens$"), "max_tokens"),
    (re.compile(r"^response_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"^reasoning_effort"), "output_config.effort"),
    (re.compile(r"^enable_thinking"), "thinking.type"),
    (re.compile(r"^thinking_token_budget"), "thinking.budget_tokens"),
    (re.compile(r"^(tools\[\d+\])\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"^(tools\[\d+\]|tool_choice)\.function"), r"\1"),
    (re.compile(r"^parallel_tool_calls"), "tool_choice.disable_parallel_tool_use"),
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^messages.*"), "messages"),
    (re.compile(r"^continue_final_message"), "the beginning of the answer as the last message"),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request_of(request: MessagesRequest | CountTokensRequest) -> ChatCompletionRequest:
    """Return the same request as one for a chat.

    Raises RequestError for what chats do not take, by the names that it has there.
    """
    messages = _messages_of(request)
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "tools": None if request.tools is None else [_tool_of(tool) for tool in request.tools],
        # The last message, where it is the assistant's, is the beginning of the answer.
        "continue_final_message": messages[-1]["role"] == "assistant" or None,
    }
    if (choice := request.tool_choice) is not None:
        fields["tool_choice"] = _choice_of(choice.type, choice.name)
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if (thinking := request.thinking) is not None:
        fields["enable_thinking"] = False if thinking.type == "disabled" else None
        fields["thinking_token_budget"] = thinking.budget_tokens
    if (output := request.output_config) is not None:
        fields["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = {"name": "answer", "schema": output.format.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request, MessagesRequest):
        fields |= {
            "max_completion_tokens": request.max_tokens,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stream": request.stream,
        }
    return read_chat_request(fields)


def _choice_of(kind: str, name: str | None) -> Any:
    if kind == "tool":
        if name is None:
            raise RequestError("tool_choice.name is missing", "tool_choice.name")
        return {"type": "function", "function": {"name": name}}
    if name is not None:
        raise RequestError(
            f"tool_choice.name is for the type 'tool', not {kind!r}", "tool_choice.name"
        )
    return _CHOICES[kind]


def _tool_of(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _messages_of(request: MessagesRequest | CountTokensRequest) -> list[dict[str, Any]]:
    transcript = Transcript()
    if request.system:
        transcript.say("system", _join(request.system))
    # Neighbours of one role are one message, as in Anthropic's API.
    for role, messages in itertools.groupby(request.messages, key=lambda message: message.role):
        if role == "system":
            for message in messages:
                transcript.say("system", _join(message.content))  # type: ignore[arg-type]
        elif role == "user":
            _add_user(transcript, _blocks_of(messages))
        else:
            _add_assistant(transcript, _blocks_of(messages))
    last = transcript.messages[-1]
    if last["role"] == "assistant" and (last.get("tool_calls") or not last["content"]):
        raise RequestError(
            "the last message is the assistant's and holds no text to go on with; send the results "
            "of its calls, or leave it out",
            f"messages[{len(request.messages) - 1}]",
        )
    return transcript.messages


def _blocks_of(messages: Iterable[Message]) -> Iterator[Any]:
    for message in messages:
        content = message.content
        if isinstance(content, str):
            yield TextBlock(type="text", text=content)
        else:
            yield from content


def _add_user(transcript: Transcript, blocks: Iterator[Any]) -> None:
    for is_result, group in itertools.groupby(
        blocks, key=lambda block: isinstance(block, ToolResultBlock)
    ):
        if not is_result:
            transcript.say("user", _content_of(list(group)))
            continue
        for block in group:
            content = _content_of(block.content or "")
            if block.is_error:
                content = _with_error(content)
            transcript.give_result(block.tool_use_id, content)


def _with_error(content: Any) -> Any:
    # Chats have no other place to say so.
    if isinstance(content, str):
        return f"Error: {content}"
    return [{"type": "text", "text": "Error: "}, *content]


def _add_assistant(transcript: Transcript, blocks: Iterator[Any]) -> None:
    for kind, group in itertools.groupby(blocks, key=type):
        if kind is TextBlock:
            transcript.answer("".join(block.text for block in group))
        for block in () if kind is TextBlock else group:
            if isinstance(block, ThinkingBlock):
                transcript.think(block.thinking)
            else:
                assert isinstance(block, ToolUseBlock)
                arguments = json.dumps(block.input, ensure_ascii=False)
                transcript.call(block.id, block.name, arguments)
    if not transcript.messages or transcript.messages[-1]["role"] != "assistant":
        transcript.answer("")


def _content_of(content: str | Sequence[TextBlock | ImageBlock]) -> Any:
    """Return text, or the parts of a chat message where there are images."""
    if isinstance(content, str):
        return content
    if all(isinstance(block, TextBlock) for block in content):
        return _join(content)  # type: ignore[arg-type]
    parts: list[dict[str, Any]] = []
    for block in content:
        if isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
        else:
            image = {"url": _address_of(block.source)}
            parts.append({"type": "image_url", "image_url": image})
    return parts


def _address_of(source: ImageSource) -> str:
    if source.type == "url":
        if source.url is None:
            raise RequestError("an image's source.url is missing", "messages")
        return source.url
    if source.data is None or source.media_type is None:
        raise RequestError("an image's source needs data and media_type", "messages")
    return f"data:{source.media_type};base64,{source.data}"


def _join(texts: Texts | Sequence[TextBlock]) -> str:
    """Return blocks as one text, each on a line of its own."""
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts)
