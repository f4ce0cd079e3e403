"""Requests and answers of `/v1/chat/completions`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import Answer, whole
from mlc_llm.serve.protocol.generation import GenerationRequest
from mlc_llm.serve.protocol.messages import Messages
from mlc_llm.serve.protocol.tools import AnswerCall, ToolChoice, Tools, read_tool_use
from mlc_llm.serve.protocol.usage import Usage
from mlc_llm.text.reasoning import ReasoningEffort
from mlc_llm.text.tool_calls.tools import ToolUse

MAX_TOP_LOGPROBS = 20
_MAX_TEMPLATE_VARIABLES = 64

FinishReason = Literal["stop", "length", "tool_calls"]


class ChatCompletionRequest(GenerationRequest):
    """A conversation to answer.

    Beyond OpenAI's: chat_template_kwargs, variables for the model's chat template;
    add_generation_prompt, false to end the prompt with the last message; continue_final_message,
    true to go on writing the last message, one of the assistant's; enable_thinking, whether the
    model is to reason; thinking_token_budget, how many tokens of reasoning an answer may have, then
    its end is forced; separate_reasoning, false to leave reasoning in the content;
    include_reasoning, false to leave it out of the answer.
    """

    messages: Messages
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: StrictBool | None = None
    thinking_token_budget: Annotated[int, whole(0)] | None = None
    separate_reasoning: StrictBool | None = None
    include_reasoning: StrictBool | None = None
    max_tokens: Annotated[int, whole(1)] | None = Field(
        None, description="Older name of max_completion_tokens."
    )
    max_completion_tokens: Annotated[int, whole(1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, whole(0, MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Field(max_length=_MAX_TEMPLATE_VARIABLES)] | None
    ) = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None

    @cached_property
    def tool_use(self) -> ToolUse:
        """The tools and the choice between them. Raises RequestError."""
        return read_tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def max_new_tokens(self) -> int | None:
        """How many tokens an answer may have."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to report with each; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def model_post_init(self, context: Any) -> None:
        """Check fields against each other. Raises RequestError."""
        super().model_post_init(context)
        assert self.tool_use is not None  # it is read once, and here
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(
                f"max_tokens is {old} and max_completion_tokens is {new}; give one of them",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt begins a new message, continue_final_message goes on with "
                "the last one; set one of them",
                "continue_final_message",
            )


class TopLogprob(BaseModel):
    """A token and its log-probability; bytes are its UTF-8, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None = None


class AnswerMessage(Answer):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnswerCall] | None = None
    refusal: str | None = None
    annotations: list[Any] = Field(default=[], description="Empty: no answer cites anything.")

    def model_post_init(self, context: Any) -> None:
        """Count refusal as set, so that it is written: clients look for the key."""
        self.model_fields_set.add("refusal")


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | None = None
    system_fingerprint: str | None = None


class DeltaFunction(Answer):
    """More of a call: first the name, then pieces of the arguments' JSON text."""

    name: str | None = None
    arguments: str | None = None


class DeltaCall(Answer):
    """The index-th call of an answer; the first piece brings id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class ChoiceDelta(Answer):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaCall] | None = None
    refusal: str | None = None


class ChunkChoice(BaseModel):
    """The answer that a chunk belongs to."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Answer):
    """A piece of the answers as they are made; usage is there where the request asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None
