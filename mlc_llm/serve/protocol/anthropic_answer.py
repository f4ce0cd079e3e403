"""What `/v1/messages` answers with: the message, its blocks, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from mlc_llm.serve.protocol.base import Answer

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class TextContent(BaseModel):
    """What the model says to the user."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ThinkingContent(BaseModel):
    """What the model thinks before it answers or calls. There is no signature to check."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class ToolUseContent(BaseModel):
    """A tool that the client is to call.

    Of a call that max_tokens cut, input has what was written of it in a stream; in an answer that
    is not streamed such a call is text.
    """

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextContent | ThinkingContent | ToolUseContent


class MessageUsage(BaseModel):
    """Tokens of prompt and answer.

    input_tokens are those of the prompt that were computed, cache_read_input_tokens those that
    the prefix cache knew.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(BaseModel):
    """A message of the model."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock] = Field(default_factory=list)
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(BaseModel):
    """How many tokens a conversation has as a prompt."""

    input_tokens: int


class MessageDelta(Answer):
    """What an event adds to a block, or to the message at its end.

    Which fields it has depends on its type; at the message's end it has none.
    """

    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessageEvent(Answer):
    """An event of a stream; which fields it has depends on its type.

    message: what is known of it at the beginning. index: of the block that the event is about.
    content_block: it, as it begins. delta: what is added. usage: at the end, all of it.
    """

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: AnthropicMessage | None = None
    index: int | None = None
    content_block: ContentBlock | None = None
    delta: MessageDelta | None = None
    usage: MessageUsage | None = None
