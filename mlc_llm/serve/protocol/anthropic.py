"""Requests of Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

What a model sees of them is the affair of `serve/anthropic_input.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr, Tag

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import (
    MAX_STOP_STRINGS,
    OnlyFalse,
    RequestBody,
    StopString,
    number,
    whole,
)
from mlc_llm.serve.protocol.fields import (
    CheckedBody,
    Refused,
    WithoutEffect,
    choose_class,
    with_fields,
)
from mlc_llm.serve.protocol.messages import MAX_MESSAGES

_MAX_BLOCKS = 1024
_MAX_TOOLS = 128

_WITHOUT_EFFECT: WithoutEffect = {
    "metadata": "there are no accounts",
    "user_profile_id": "there are no accounts",
    "workspace_id": "there are no accounts",
    "cache_control": "the prefix cache keeps what was used last",
    "inference_geo": "the model runs where the server is",
}
_REFUSED: Refused = {
    "container": ((), "the server runs no code"),
    "mcp_servers": (([],), "the server calls no others"),
    "context_management": ((), "no part of the messages is left out; shorten them"),
    "compaction": ((), "no part of the messages is left out; shorten them"),
    "thread": ((False,), "the server stores nothing; for a client's tool_runner, thread=False"),
    "fallbacks": (([],), "there is one model"),
    "fallback_credit_token": ((), "there are no accounts"),
    "billing_policy": ((), "there are no accounts"),
    "diagnostics": ((), "there is nothing to tell beside the answer"),
    "speed": (("standard",), "there is one speed"),
}
_REFUSED_ANSWERS: Refused = {
    **_REFUSED,
    "service_tier": (("auto", "standard_only"), "there is one tier"),
}

Identifier = Annotated[StrictStr, Field(max_length=256)]


class Block(RequestBody):
    """What all blocks may have: a hint to caches of other servers, without effect."""

    cache_control: Any = None


class TextBlock(Block):
    """Text; citations of earlier answers have no effect."""

    type: Literal["text"]
    text: StrictStr
    citations: Any = None


class ImageSource(RequestBody):
    """An image in base64, or its address."""

    type: Literal["base64", "url"]
    media_type: StrictStr | None = None
    data: StrictStr | None = None
    url: StrictStr | None = None


class ImageBlock(Block):
    """An image, for models that see."""

    type: Literal["image"]
    source: ImageSource
    transformations: None = None


class ThinkingBlock(RequestBody):
    """What a model has thought before; templates say which of it a model sees.

    signature is that of servers which check it, without effect.
    """

    type: Literal["thinking"]
    thinking: StrictStr
    signature: StrictStr | None = None


class ToolUseBlock(Block):
    """A call of a tool in an earlier answer."""

    type: Literal["tool_use"]
    id: Identifier
    name: StrictStr
    input: dict[str, Any]
    caller: Any = None
    toolset_name: None = None


class ToolResultBlock(Block):
    """What a called tool has returned; where is_error is set, the model is told so."""

    type: Literal["tool_result"]
    tool_use_id: Identifier
    content: StrictStr | Annotated[list[ResultBlock], Field(max_length=_MAX_BLOCKS)] | None = None
    is_error: StrictBool | None = None
    toolset_name: None = None


def _tag(*kinds: str) -> Any:
    """Return what chooses a block's class by its type, and refuses other types."""
    names = ", ".join(repr(kind) for kind in kinds)
    return choose_class(
        {kind: f"<{kind}>" for kind in kinds}, f"the server takes blocks of type {names} only here"
    )


_Text = Annotated[TextBlock, Tag("<text>")]
_Image = Annotated[ImageBlock, Tag("<image>")]
ResultBlock = Annotated[_Text | _Image, _tag("text", "image")]
UserBlock = Annotated[
    _Text | _Image | Annotated[ToolResultBlock, Tag("<tool_result>")],
    _tag("text", "image", "tool_result"),
]
AssistantBlock = Annotated[
    _Text
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")],
    _tag("text", "thinking", "tool_use"),
]
Texts = StrictStr | Annotated[list[TextBlock], Field(max_length=_MAX_BLOCKS)]


class UserMessage(RequestBody):
    """A message of the user, with the results of calls."""

    role: Literal["user"]
    content: StrictStr | Annotated[list[UserBlock], Field(min_length=1, max_length=_MAX_BLOCKS)]


class AssistantMessage(RequestBody):
    """A message of the model. As the last one it is the beginning of the answer."""

    role: Literal["assistant"]
    content: StrictStr | Annotated[list[AssistantBlock], Field(max_length=_MAX_BLOCKS)]


class SystemMessage(RequestBody):
    """An instruction in the course of a conversation."""

    role: Literal["system"]
    content: Texts


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    choose_class(
        {role: f"<{role}>" for role in ("user", "assistant", "system")},
        "a message has the role 'user', 'assistant' or 'system'",
        key="role",
    ),
]


class Tool(Block):
    """A tool that the client runs. strict: its input must match the schema.

    eager_input_streaming has no effect: input comes as it is written.
    """

    type: Literal["custom"] | None = Field(None, description="The server runs no tools of its own.")
    name: Annotated[StrictStr, Field(min_length=1, max_length=128)]
    description: StrictStr | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None
    eager_input_streaming: Any = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: OnlyFalse | None = None
    input_examples: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolChoice(RequestBody):
    """Whether the model may call tools or must, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class Thinking(RequestBody):
    """Whether the model thinks before it answers; what it thinks comes in full.

    budget_tokens, for the type "enabled": how many tokens, after which the end is forced.
    """

    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: Annotated[int, whole(1)] | None = None
    display: None = None

    def model_post_init(self, context: Any) -> None:
        """Check that there is a budget where there is to be one. Raises RequestError."""
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise RequestError(
                f"thinking.budget_tokens goes with the type 'enabled', which needs it; the type is "
                f"{self.type!r}",
                "thinking.budget_tokens",
            )


class JsonFormat(RequestBody):
    """A JSON schema that the text of the answer must match."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestBody):
    """How much the model thinks, and what its text must be."""

    effort: StrictStr | None = None
    format: JsonFormat | None = None


if TYPE_CHECKING:
    _KnownByCount = CheckedBody
    _KnownByMessages = CheckedBody
else:
    _KnownByCount = with_fields("KnownCountFields", _WITHOUT_EFFECT, _REFUSED)
    _KnownByMessages = with_fields("KnownMessageFields", _WITHOUT_EFFECT, _REFUSED_ANSWERS)


class _Prompt(RequestBody):
    model: Identifier | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[Tool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class CountTokensRequest(_KnownByCount, _Prompt):
    """A conversation whose tokens are to be counted."""


class MessagesRequest(_KnownByMessages, _Prompt):
    """A conversation to answer, and how to choose tokens.

    What is left out comes from the model's settings.
    """

    max_tokens: Annotated[int, whole(1)]
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float, number(0, 2)] | None = None
    top_p: Annotated[float, number(0, 1)] | None = None
    top_k: Annotated[int, whole(0)] | None = None
    stream: StrictBool | None = None

    def model_post_init(self, context: Any) -> None:
        """Check fields against each other. Raises RequestError."""
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise RequestError(
                f"thinking.budget_tokens is {budget:,}; max_tokens, {self.max_tokens:,}, counts "
                "thoughts too and must be greater",
                "thinking.budget_tokens",
            )
