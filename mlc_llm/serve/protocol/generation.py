"""What requests for chats and for completions have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import (
    MAX_INT32,
    MAX_INT64,
    MAX_STOP_TOKENS,
    Int,
    LogitBias,
    OnlyFalse,
    RequestBody,
    StopStrings,
    number,
    whole,
)
from mlc_llm.serve.protocol.response_format import ResponseFormat
from mlc_llm.serve.protocol.support import KnownFields

MAX_CHOICES = 128

Name = Annotated[StrictStr, Field(max_length=256)]


class StreamOptions(RequestBody):
    """What a stream tells beside the answer.

    include_obfuscation pads events where others may watch their lengths; here it has no effect.
    """

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    continuous_usage_stats: OnlyFalse | None = None


class DebugConfig(RequestBody):
    """MLC LLM's debugging options, for servers that were started with --enable-debug.

    How grammars are run has no effect where there are none.
    """

    ignore_eos: StrictBool = False
    pinned_system_prompt: OnlyFalse | None = None
    special_request: None = None
    grammar_execution_mode: Literal["jump_forward", "constraint"] | None = None
    disagg_config: None = None


class GenerationRequest(KnownFields):
    """How to sample and when to stop. What is left out or null comes from the model's settings.

    Beyond OpenAI's: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids,
    priority (lower ones go first), cache_salt (requests of one salt share cached prompts),
    request_id, debug_config (with --enable-debug).
    """

    model: Name | None = None
    frequency_penalty: Annotated[float, number(-2, 2)] | None = None
    presence_penalty: Annotated[float, number(-2, 2)] | None = None
    repetition_penalty: Annotated[float, number(0.01, 100)] | None = None
    temperature: Annotated[float, number(0, 2)] | None = None
    top_p: Annotated[float, number(0, 1)] | None = None
    top_k: Annotated[int, whole(-1)] | None = None
    min_p: Annotated[float, number(0, 1)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, whole(-MAX_INT64 - 1, MAX_INT64)] | None = None
    n: Annotated[int, whole(1, MAX_CHOICES)] | None = None
    min_tokens: Int | None = None
    ignore_eos: StrictBool | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[Int], Field(max_length=MAX_STOP_TOKENS)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = None
    response_format: ResponseFormat | None = None
    priority: Annotated[int, whole(-MAX_INT32 - 1)] | None = None
    cache_salt: Name | None = None
    request_id: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None
    debug_config: DebugConfig | None = None

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """The pairs of logit_bias."""
        return tuple((self.logit_bias or {}).items())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def ignores_eos(self) -> bool:
        """Whether the model's own ends are passed over."""
        return bool(self.ignore_eos or (self.debug_config and self.debug_config.ignore_eos))

    def model_post_init(self, context: Any) -> None:
        """Check fields against each other. Raises RequestError."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams; set stream too", "stream_options")
