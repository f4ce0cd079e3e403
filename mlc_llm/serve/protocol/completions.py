"""Requests and answers of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, StrictBool, StrictStr

from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import MAX_INT32, Answer, Int, whole
from mlc_llm.serve.protocol.generation import MAX_CHOICES, GenerationRequest
from mlc_llm.serve.protocol.usage import Usage

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
MAX_SEQUENCES = 1024  # prompts times answers of each
MAX_LOGPROBS = 5
_MAX_PROMPT_TOKENS = 1 << 22

FinishReason = Literal["stop", "length"]


def _check_prompt(value: Any) -> Any:
    """Tell the wrong place of a prompt, which a union of types would not. Raises RequestError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError(
            "prompt must be a text, a list of token ids, or a list of either, and not empty",
            "prompt",
        )
    if isinstance(value[0], str | list):
        if len(value) > MAX_PROMPTS:
            raise RequestError(f"prompt has {len(value):,} prompts, {MAX_PROMPTS} may be", "prompt")
        kind = type(value[0])
        for place, item in enumerate(value):
            if not isinstance(item, kind):
                raise RequestError("prompt mixes texts and token ids", f"prompt[{place}]")
            if isinstance(item, list):
                _check_tokens(item, f"prompt[{place}]")
    else:
        _check_tokens(value, "prompt")
    return value


def _check_tokens(tokens: list[Any], where: str) -> None:
    if not tokens or len(tokens) > _MAX_PROMPT_TOKENS:
        raise RequestError(f"{where} has {len(tokens):,} token ids", where)
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token <= MAX_INT32:
            shown = str(token)[:80] if isinstance(token, int | float | str) else "something else"
            raise RequestError(
                f"{where}[{place}] is {shown!r}; token ids are whole numbers from 0",
                f"{where}[{place}]",
            )


_Prompt = StrictStr | list[StrictStr] | list[Int] | list[list[Int]]
# Checked by `_check_prompt`; a second look at each of a million ids would be for nothing.
Prompt = Annotated[Any, BeforeValidator(_check_prompt, json_schema_input_type=_Prompt)]


class CompletionRequest(GenerationRequest):
    """Texts to continue.

    echo puts the prompt before the text, suffix is put after it. Of best_of answers, the n with
    the highest mean log-probability are given. Beyond OpenAI's: add_special_tokens, false to leave
    out what the tokenizer puts before a text.
    """

    prompt: Prompt
    max_tokens: Annotated[int, whole(0)] | None = None
    logprobs: Annotated[int, whole(0, MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, whole(1, MAX_CHOICES)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    add_special_tokens: StrictBool = True

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        is_list = not isinstance(self.prompt, str) and isinstance(self.prompt[0], str | list)
        return cast("list[str | list[int]]", self.prompt if is_list else [self.prompt])

    @property
    def max_new_tokens(self) -> int:
        """How many tokens an answer may have."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_candidates(self) -> int:
        """How many answers are made, of which `num_choices` are given."""
        return self.num_choices if self.best_of is None else self.best_of

    def model_post_init(self, context: Any) -> None:
        """Check fields against each other. Raises RequestError."""
        super().model_post_init(context)
        if self.num_candidates < self.num_choices:
            raise RequestError(
                f"best_of is {self.best_of}, less than n, {self.n}; raise it", "best_of"
            )
        if self.num_candidates > self.num_choices and self.stream:
            raise RequestError(
                "best_of chooses among finished answers, so it cannot be streamed", "best_of"
            )
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens 0 is for echo alone; raise it", "max_tokens")
        if (total := len(self.prompts) * self.num_candidates) > MAX_SEQUENCES:
            raise RequestError(
                f"{len(self.prompts)} prompts with {self.num_candidates} answers each are {total} "
                f"sequences, {MAX_SEQUENCES} may be; send several requests",
                "prompt",
            )


class CompletionLogprobs(BaseModel):
    """Log-probabilities by place; text_offset counts characters of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(BaseModel):
    """One of the texts, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Answer):
    """The texts, or pieces of them in a stream; usage is not in each piece."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
