"""`/v1/rerank` without HTTP: which of some texts fit a query best.

Knows the request and the response, and the scores of vectors. Those of rerankers are judging.py's.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictBool, StrictStr

from mlc_llm.engine.embedding import EmbeddingModel, normalize
from mlc_llm.errors import RequestError
from mlc_llm.serve.embeddings import MAX_INPUTS, EmbeddingUsage
from mlc_llm.serve.judging import judge
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.base import Answer, RequestBody, whole

MAX_INSTRUCTION_LEN = 4096  # characters

_Text = Annotated[StrictStr, Field(min_length=1)]


class Document(RequestBody):
    """A text, as an object."""

    text: _Text


class RerankRequest(RequestBody):
    """A query and the documents to put in order.

    top_n: of how many to tell; all if left out. return_documents: with their texts. instruction:
    what documents are to be good for, for rerankers. truncate_prompt_tokens: texts with more tokens
    lose their end, but for special tokens there; for rerankers, prompts of the query and a document
    lose the document's end. -1 stands for the most that the model takes. Without it they are
    refused.
    """

    query: _Text
    documents: Annotated[list[_Text | Document], Field(min_length=1, max_length=MAX_INPUTS)]
    model: StrictStr | None = None
    top_n: Annotated[int, whole(1)] | None = None
    return_documents: StrictBool | None = None
    instruction: (
        Annotated[StrictStr, Field(min_length=1, max_length=MAX_INSTRUCTION_LEN)] | None
    ) = None
    truncate_prompt_tokens: Annotated[int, whole(1)] | Literal[-1] | None = None
    user: StrictStr | None = None


class RerankResult(Answer):
    """A document by its place in the request.

    relevance_score: of a reranker the probability that it fits, from 0 to 1; else the cosine of the
    angle between its vector and the query's, from -1 to 1.
    """

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """The documents that fit best, the best one first."""

    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


async def rerank(model: EmbeddingModel | ServedModel, request: RerankRequest) -> RerankResponse:
    """Put documents in order; those with equal scores stay as they are.

    Raises RequestError and ContextTooLong for texts the model cannot take, QueueFull,
    EngineStopped or StepFailed.
    """
    texts = [item if isinstance(item, str) else item.text for item in request.documents]
    if isinstance(model, EmbeddingModel):
        scores, num_tokens = await _compare(model, request, texts)
    else:
        scores, num_tokens = await judge(
            model, request.query, texts, request.instruction, request.truncate_prompt_tokens
        )
    best = np.argsort(-scores, kind="stable")[: request.top_n]
    results = []
    for index in best.tolist():
        result = RerankResult(index=index, relevance_score=float(scores[index]))
        if request.return_documents:
            result.document = Document(text=texts[index])
        results.append(result)
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return RerankResponse(model=model.name, results=results, usage=usage)


async def _compare(
    model: EmbeddingModel, request: RerankRequest, texts: list[str]
) -> tuple[NDArray[np.float64], int]:
    """Return the cosines between the vectors of the texts and the query's, and all tokens."""
    if request.instruction is not None:
        raise RequestError(
            f"instruction is for rerankers; {model.name} is a model for embeddings, which may want "
            "one at the beginning of the query",
            "instruction",
        )
    # Tokenizing megabytes of text must not hold up other requests of the event loop.
    inputs = await asyncio.to_thread(
        _read_texts, model, [*texts, request.query], request.truncate_prompt_tokens
    )
    try:
        vectors = normalize(await model.embed(inputs))
    except RequestError as error:
        raise _with_place(error, len(texts)) from None
    # Not as a product of matrices, whose sums differ from row to row: equal texts score equally.
    scores: NDArray[np.float64] = (vectors[:-1] * vectors[-1]).sum(axis=1, dtype=np.float64)
    return np.clip(scores, -1, 1), sum(len(tokens) for tokens in inputs)


def _read_texts(model: EmbeddingModel, texts: list[str], max_len: int | None) -> list[list[int]]:
    limit = model.max_input_len if max_len == -1 else max_len
    return [model.token_ids(text, limit) for text in texts]


def _with_place(error: RequestError, num_documents: int) -> RequestError:
    """Return an error about a numbered input with the field that it came from."""
    if found := re.match(r"input (\d+)", str(error)):
        number = int(found[1])
        error.param = f"documents[{number}]" if number < num_documents else "query"
        error.args = (error.param + str(error)[found.end() :],)
    return error
