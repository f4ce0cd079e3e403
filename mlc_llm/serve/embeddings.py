"""`/v1/embeddings` without HTTP: inputs of any accepted kind to vectors, in their order.

Knows the request and the response. What becomes of token ids is `engine/embedding.py`'s affair.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt, StrictStr

from mlc_llm.engine.embedding import EmbeddingModel, normalize
from mlc_llm.errors import RequestError
from mlc_llm.serve.protocol.base import RequestBody

MAX_INPUTS = 2048

_Tokens = list[StrictInt]
_Input = (
    StrictStr
    | Annotated[list[StrictStr], Field(max_length=MAX_INPUTS)]
    | _Tokens
    | Annotated[list[_Tokens], Field(max_length=MAX_INPUTS)]
)


class EmbeddingRequest(RequestBody):
    """One text, several, or the same as token ids, which are then taken as they are.

    truncate_prompt_tokens: inputs with more tokens lose their end, but for special tokens there; -1
    stands for the most that the model takes. Without it they are refused.
    """

    input: _Input
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=1)] | Literal[-1] | None = None
    user: StrictStr | None = None


class Embedding(BaseModel):
    """The vector of one input: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The vectors, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def embed(model: EmbeddingModel, request: EmbeddingRequest) -> EmbeddingResponse:
    """Answer a request for embeddings.

    Raises RequestError and ContextTooLong for inputs or dimensions the model does not have,
    QueueFull, EngineStopped or StepFailed.
    """
    if request.dimensions is not None and request.dimensions > model.num_dimensions:
        raise RequestError(
            f"dimensions is {request.dimensions}, the vectors of {model.name} have "
            f"{model.num_dimensions}; ask for at most that",
            "dimensions",
        )
    # Tokenizing megabytes of text must not hold up other requests of the event loop.
    max_len = request.truncate_prompt_tokens
    if max_len == -1:
        max_len = model.max_input_len
    inputs = await asyncio.to_thread(_read_inputs, model, request.input, max_len)
    vectors = await model.embed(inputs)
    if request.dimensions is not None:
        # Kusupati et al. 2022: the first dimensions serve alone, at length 1 again.
        vectors = normalize(vectors[:, : request.dimensions])
    num_tokens = sum(len(tokens) for tokens in inputs)
    encode = _to_base64 if request.encoding_format == "base64" else _to_numbers
    return EmbeddingResponse(
        data=[
            Embedding(index=index, embedding=encode(vector)) for index, vector in enumerate(vectors)
        ],
        model=model.name,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def _read_inputs(model: EmbeddingModel, given: _Input, max_len: int | None) -> list[list[int]]:
    """Return at most `max_len` token ids of each input. Raises RequestError for empty texts."""
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    items = cast("list[str | list[int]]", [given] if is_one else given)
    inputs = []
    for number, item in enumerate(items):
        if not item:
            raise RequestError(f"input {number} is empty; give it some text", "input")
        ids = model.token_ids(item, max_len) if isinstance(item, str) else item[:max_len]
        inputs.append(ids)
    return inputs


def _to_numbers(vector: NDArray[np.float32]) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _to_base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
