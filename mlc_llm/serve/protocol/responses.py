"""Requests of `/v1/responses`: instructions and items that a response is to follow.

What a model sees of them is the affair of `serve/response_input.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr, Tag

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import OnlyFalse, RequestBody, number, whole
from mlc_llm.serve.protocol.fields import (
    CheckedBody,
    Refused,
    WithoutEffect,
    choose_class,
    with_fields,
)

MAX_ITEMS = 4096
_MAX_PARTS = 1024
_MAX_TOOLS = 128
_MAX_METADATA = 16

_NO_STORE = "the server stores nothing; send the whole conversation as input"
_WITHOUT_EFFECT: WithoutEffect = {
    "user": "there are no accounts",
    "safety_identifier": "there are no accounts",
    "prompt_cache_key": "equal beginnings of prompts are found without it",
    "prompt_cache_options": "the prefix cache keeps what was used last",
    "prompt_cache_retention": "the prefix cache keeps what was used last",
    "max_tool_calls": "it counts calls of built-in tools, and there are none",
}
_REFUSED: Refused = {
    "store": ((False,), _NO_STORE),
    "previous_response_id": ((), _NO_STORE),
    "conversation": ((), _NO_STORE),
    "prompt": ((), "the server stores no prompts; send instructions and input"),
    "background": ((False,), "responses are made while the client waits"),
    "background_options": ((), "responses are made while the client waits"),
    "include": (([],), "everything the server knows is in the response already"),
    "top_logprobs": ((0,), "for log-probabilities ask v1/chat/completions"),
    "truncation": (("disabled",), "no part of the input is left out; shorten it"),
    "context_management": (([],), "no part of the input is left out; shorten it"),
    "moderation": ((), "there is no moderation model"),
    "image": ((), "responses are text only"),
    "access_programs": ((), "there are no accounts"),
}

Status = Literal["in_progress", "completed", "incomplete"]
Identifier = Annotated[StrictStr, Field(max_length=256)]


class InputPart(RequestBody):
    """A part of a message: text, in the words of who says it."""

    type: Literal["input_text", "output_text", "text"]
    text: StrictStr
    # What comes back with parts of earlier responses.
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


class RefusalPart(RequestBody):
    """What a model has said in place of an answer."""

    type: Literal["refusal"]
    refusal: StrictStr


class ImagePart(RequestBody):
    """An image, for models that see: its address, or a data URL. There are no files to name."""

    type: Literal["input_image"]
    image_url: StrictStr
    detail: Literal["low", "high", "auto", "original"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: Any = None


_PARTS = {
    **dict.fromkeys(("input_text", "output_text", "text"), "<text>"),
    "input_image": "<image>",
    "refusal": "<refusal>",
}
Part = Annotated[
    Annotated[InputPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    choose_class(
        _PARTS,
        "the server takes parts of type 'input_text', 'input_image', 'output_text' and 'refusal' "
        "only",
    ),
]
Content = StrictStr | Annotated[list[Part], Field(max_length=_MAX_PARTS)]


class MessageItem(RequestBody):
    """A message, also one of an earlier response."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Identifier | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(RequestBody):
    """A call of a function in an earlier response, its arguments as JSON text."""

    type: Literal["function_call"]
    call_id: Identifier
    name: StrictStr
    arguments: StrictStr
    id: Identifier | None = None
    status: Status | None = None
    caller: None = None
    namespace: None = None
    async_: OnlyFalse | None = Field(None, alias="async")


class FunctionCallOutputItem(RequestBody):
    """What a called function has returned."""

    type: Literal["function_call_output"]
    call_id: Identifier
    output: Content
    id: Identifier | None = None
    name: StrictStr | None = None
    status: Status | None = None
    caller: None = None
    namespace: None = None


class ReasoningPart(RequestBody):
    """Text of what a model has thought."""

    type: Literal["reasoning_text"]
    text: StrictStr


class ReasoningItem(RequestBody):
    """What a model has thought in an earlier response; templates say which of it a model sees.

    summary and encrypted_content are those of other servers' reasoning, without effect.
    """

    type: Literal["reasoning"]
    id: Identifier | None = None
    summary: Any = None
    content: Annotated[list[ReasoningPart], Field(max_length=_MAX_PARTS)] | None = None
    encrypted_content: Any = None
    status: Status | None = None


def _usual_item(value: Any) -> str:
    return "message" if isinstance(value, dict) and "role" in value else ""


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    choose_class(
        {kind: f"<{kind}>" for kind in _ITEMS},
        "the server takes items of type 'message', 'function_call', 'function_call_output' and "
        "'reasoning' only: it stores nothing and runs no tools",
        usual=_usual_item,
    ),
]


class ResponseTextFormat(RequestBody):
    """What the text of a response must be; schema and what goes with it are for "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None
    description: StrictStr | None = None


class TextConfig(RequestBody):
    """How the text of a response is."""

    format: ResponseTextFormat | None = None
    verbosity: Literal["medium"] | None = Field(
        None, description="Say in the instructions how long responses should be."
    )


class Reasoning(RequestBody):
    """How much a model thinks before it answers; what it thinks is in the response as it is."""

    effort: StrictStr | None = None
    summary: None = None
    generate_summary: None = None
    context: None = None
    mode: Literal["standard"] | None = None


class ResponseTool(RequestBody):
    """A function that the client runs. strict: its arguments must match `parameters`."""

    type: Literal["function"] = Field(description="The server runs no tools of its own.")
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    async_: OnlyFalse | None = Field(None, alias="async")
    defer_loading: OnlyFalse | None = None
    output_schema: None = None


class NamedFunction(RequestBody):
    """The function that must be called."""

    type: Literal["function"]
    name: StrictStr


class ResponseStreamOptions(RequestBody):
    """include_obfuscation pads events where others may watch their lengths; without effect."""

    include_obfuscation: StrictBool | None = None


ToolChoice = Literal["none", "auto", "required"] | NamedFunction
Metadata = Annotated[
    dict[
        Annotated[StrictStr, Field(max_length=64)],
        Annotated[StrictStr, Field(max_length=512)],
    ],
    Field(max_length=_MAX_METADATA),
]

if TYPE_CHECKING:
    _Known = CheckedBody
else:
    _Known = with_fields("KnownResponseFields", _WITHOUT_EFFECT, _REFUSED)


class ResponseRequest(_Known):
    """What to respond to, and how. Nothing is stored: the input is the whole conversation.

    Items of earlier responses may be sent back as they came. metadata comes back in the response.
    """

    model: Identifier | None = None
    input: (
        Annotated[StrictStr, Field(min_length=1)]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    )
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[int, whole(1)] | None = None
    temperature: Annotated[float, number(0, 2)] | None = None
    top_p: Annotated[float, number(0, 1)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning: Reasoning | None = None
    metadata: Metadata | None = None
    stream: StrictBool | None = None
    stream_options: ResponseStreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = None

    def model_post_init(self, context: Any) -> None:
        """Check fields against each other. Raises RequestError."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams; set stream too", "stream_options")
        form = self.text.format if self.text is not None else None
        if form is not None and form.type != "json_schema":
            for name in ("name", "schema_", "strict", "description"):
                if getattr(form, name) is not None:
                    field = name.rstrip("_")
                    raise RequestError(
                        f"text.format.{field} is for the type 'json_schema', not {form.type!r}",
                        f"text.format.{field}",
                    )
        elif form is not None and form.schema_ is None:
            raise RequestError("text.format.schema is missing", "text.format.schema")
