"""What `/v1/responses` answers with: the response, its items, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from mlc_llm.serve.protocol.base import Answer
from mlc_llm.serve.protocol.responses import Status

EventType = Literal[
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class OutputText(BaseModel):
    """What the model says to the user."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default=[], description="Empty: no response cites anything.")
    logprobs: list[Any] = Field(default=[], description="Empty.")


class ReasoningText(BaseModel):
    """What the model thinks."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(BaseModel):
    """A message of the model."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputReasoning(BaseModel):
    """What the model thinks before it answers or calls."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status
    summary: list[Any] = Field(default=[], description="Empty: content is there in full.")
    content: list[ReasoningText]


class OutputCall(BaseModel):
    """A function that the client is to call, its arguments as JSON text.

    Arguments are incomplete where the status is, in streams; in a response that is not streamed a
    call that was cut is text.
    """

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(BaseModel):
    """Of the input's tokens: those that the prefix cache knew, and those written to a paid one."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Of the output's tokens: those that were thought."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of input and output."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is incomplete: it reached max_output_tokens, or the context is full."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(Answer):
    """A response, with what was asked for. It is stored nowhere."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = Field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, Any]
    service_tier: str | None = None
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None

    @property
    def output_text(self) -> str:
        """What the model says, without thoughts and calls."""
        messages = [item for item in self.output if isinstance(item, OutputMessage)]
        return "".join(part.text for message in messages for part in message.content)

    def model_post_init(self, context: Any) -> None:
        """Count what clients look for as set, so that it is written when it is null."""
        nulls = ("error", "incomplete_details", "previous_response_id", "usage", "completed_at")
        self.model_fields_set.update(nulls)


class ResponseEvent(Answer):
    """An event of a stream; which fields it has depends on its type.

    response: the response so far, in events of its own state. output_index, item_id: the item that
    the event is about; content_index: the part of it. item, part: what begins or is done. delta:
    what is added to a text or to arguments; text, arguments: the whole.
    """

    type: EventType
    sequence_number: int
    response: Response | None = None
    output_index: int | None = None
    item_id: str | None = None
    content_index: int | None = None
    item: OutputItem | None = None
    part: OutputText | ReasoningText | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None
