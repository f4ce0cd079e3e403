"""`/tokenize` and `/detokenize` without HTTP: what a model makes of text, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from mlc_llm.errors import RequestError
from mlc_llm.serve.model import ServedModel

_MAX_TOKENS = 1_000_000


class TokenizeRequest(BaseModel):
    """A text, or messages as in a chat."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False


class TokenizeResponse(BaseModel):
    """Token ids, how many they are, and how many a sequence may have."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    tokens: Annotated[
        list[Annotated[StrictInt, Field(ge=0, lt=1 << 31)]], Field(max_length=_MAX_TOKENS)
    ]


class DetokenizeResponse(BaseModel):
    """The text of token ids, special tokens included."""

    prompt: str


async def tokenize(model: ServedModel, request: TokenizeRequest) -> TokenizeResponse:
    """Return the tokens of a prompt, or of the prompt that messages become.

    `add_special_tokens` is for prompts; a chat template writes its own. Raises RequestError and
    TemplateError.
    """
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    # Megabytes of text and templates must not hold up other requests of the event loop.
    return await asyncio.to_thread(_tokenize, model, request)


def _tokenize(model: ServedModel, request: TokenizeRequest) -> TokenizeResponse:
    if request.messages is not None:
        tokens = model.prompts.token_ids(request.messages)
    else:
        tokens = model.tokenizer.encode(request.prompt or "", request.add_special_tokens)
    token_strs = None
    if request.return_token_strs:
        token_strs = [model.tokenizer.decode([token], False) for token in tokens]
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=model.max_sequence_len,
        tokens=tokens,
        token_strs=token_strs,
    )


async def detokenize(model: ServedModel, request: DetokenizeRequest) -> DetokenizeResponse:
    """Return the text of tokens. Raises RequestError for ids that the vocabulary has not."""
    return await asyncio.to_thread(_detokenize, model, request)


def _detokenize(model: ServedModel, request: DetokenizeRequest) -> DetokenizeResponse:
    for place, token in enumerate(request.tokens):
        if not model.tokenizer.has_id(token):
            raise RequestError(
                f"tokens[{place}] is {token}, which the vocabulary does not have",
                f"tokens[{place}]",
            )
    return DetokenizeResponse(prompt=model.tokenizer.decode(request.tokens, False))
