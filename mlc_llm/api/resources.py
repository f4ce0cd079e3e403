"""What an engine can be asked, under the names of OpenAI's client: chats, completions, responses,
embeddings; and reranking.

Answers are made by `serve`, from the same requests that the server takes.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any, Generic, Literal, TypeVar, overload

from mlc_llm.api.owner import Owner
from mlc_llm.api.requests import read_request
from mlc_llm.serve.catalog import ModelCard, ModelList
from mlc_llm.serve.chat import chat, chat_stream
from mlc_llm.serve.completions import complete, complete_stream
from mlc_llm.serve.embeddings import EmbeddingRequest, EmbeddingResponse, embed
from mlc_llm.serve.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from mlc_llm.serve.protocol.completions import MAX_PROMPTS, Completion, CompletionRequest
from mlc_llm.serve.protocol.response_events import Response, ResponseEvent
from mlc_llm.serve.protocol.responses import ResponseRequest
from mlc_llm.serve.rerank import RerankRequest, RerankResponse, rerank
from mlc_llm.serve.responses import RESPONSE_PREFIX, respond, respond_stream

Chunk = TypeVar("Chunk")

# What the ids of answers begin with; the engine knows requests by the same ids.
CHAT_PREFIX, TEXT_PREFIX = "chatcmpl-", "cmpl-"


class AsyncStream(Generic[Chunk]):
    """Chunks of an answer as they come. Leaving its block, or `close`, aborts the request."""

    def __init__(self, request_id: str, chunks: AsyncGenerator[Chunk, None], owner: Owner) -> None:
        self.request_id = request_id
        self._chunks = chunks
        self._owner = owner  # a model lives as long as somebody reads its answer

    def __aiter__(self) -> AsyncStream[Chunk]:
        """Return the stream."""
        return self

    async def __anext__(self) -> Chunk:
        """Wait for the next chunk."""
        return await anext(self._chunks)

    async def close(self) -> None:
        """Abort what is not finished."""
        await self._chunks.aclose()

    async def __aenter__(self) -> AsyncStream[Chunk]:
        """Return the stream."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Abort what is not finished."""
        await self.close()


def _answer_id(prefix: str, given: str | None) -> str:
    given = given or uuid.uuid4().hex
    return given if given.startswith(prefix) else prefix + given


def engine_ids(request_id: str) -> list[str]:
    """Return by what ids an engine may know a request that programs call `request_id`."""
    if request_id.startswith((CHAT_PREFIX, RESPONSE_PREFIX)):
        return [request_id]
    first = _answer_id(TEXT_PREFIX, request_id)
    # Each prompt of a list is a request of its own to the engine.
    texts = [first, *(f"{first}-{number}" for number in range(1, MAX_PROMPTS))]
    if first == request_id:
        return texts
    return [CHAT_PREFIX + request_id, RESPONSE_PREFIX + request_id, *texts]


class ChatCompletions:
    """`chat.completions`: answers to conversations."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @overload
    async def create(
        self, *, stream: Literal[False] = False, request_id: str | None = None, **fields: Any
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self, *, stream: Literal[True], request_id: str | None = None, **fields: Any
    ) -> AsyncStream[ChatCompletionChunk]: ...
    async def create(
        self, *, stream: bool = False, request_id: str | None = None, **fields: Any
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """Answer `messages`, whole or as a stream; takes the fields that the server takes.

        request_id: the answer's id, by which `abort` knows it; made up if left out. Raises
        RequestError and its kin before any work, also for a field that is not known.
        """
        request = read_request(ChatCompletionRequest, {**fields, "stream": stream})
        model = self._owner.models.find_chat(request.model)
        request_id = _answer_id(CHAT_PREFIX, request_id)
        if stream:
            chunks = await chat_stream(model, request, request_id)
            return AsyncStream(request_id, chunks, self._owner)
        return await chat(model, request, request_id)


class Completions:
    """`completions`: continuations of texts or token ids."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @overload
    async def create(
        self, *, stream: Literal[False] = False, request_id: str | None = None, **fields: Any
    ) -> Completion: ...
    @overload
    async def create(
        self, *, stream: Literal[True], request_id: str | None = None, **fields: Any
    ) -> AsyncStream[Completion]: ...
    async def create(
        self, *, stream: bool = False, request_id: str | None = None, **fields: Any
    ) -> Completion | AsyncStream[Completion]:
        """Continue `prompt`, whole or as a stream; in all else like `chat.completions.create`."""
        request = read_request(CompletionRequest, {**fields, "stream": stream})
        model = self._owner.models.find_chat(request.model)
        request_id = _answer_id(TEXT_PREFIX, request_id)
        if stream:
            chunks = await complete_stream(model, request, request_id)
            return AsyncStream(request_id, chunks, self._owner)
        return await complete(model, request, request_id)


class Responses:
    """`responses`: responses to items of a conversation. Nothing is stored."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @overload
    async def create(
        self, *, stream: Literal[False] = False, request_id: str | None = None, **fields: Any
    ) -> Response: ...
    @overload
    async def create(
        self, *, stream: Literal[True], request_id: str | None = None, **fields: Any
    ) -> AsyncStream[ResponseEvent]: ...
    async def create(
        self, *, stream: bool = False, request_id: str | None = None, **fields: Any
    ) -> Response | AsyncStream[ResponseEvent]:
        """Respond to `input`, whole or as a stream; in all else like `chat.completions.create`.

        What fails on the way is told by the stream's last event, and raised after it.
        """
        request = read_request(ResponseRequest, {**fields, "stream": stream})
        model = self._owner.models.find_chat(request.model)
        request_id = _answer_id(RESPONSE_PREFIX, request_id)
        if stream:
            events = await respond_stream(model, request, request_id)
            return AsyncStream(request_id, events, self._owner)
        return await respond(model, request, request_id)


class Embeddings:
    """`embeddings`: vectors of texts or token ids."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def create(self, **fields: Any) -> EmbeddingResponse:
        """Return the vectors of `input`; takes the fields that the server takes."""
        request = read_request(EmbeddingRequest, fields)
        return await embed(self._owner.models.find_embedding(request.model), request)


class Reranking:
    """`rerank`: documents in the order in which they fit a query; OpenAI's client has no such."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def create(self, **fields: Any) -> RerankResponse:
        """Put `documents` in order by `query`; takes the fields that the server takes."""
        request = read_request(RerankRequest, fields)
        return await rerank(self._owner.models.find_reranker(request.model), request)


class Models:
    """`models`: what the engine serves."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def list(self) -> ModelList:
        """Return the models, the one for chats first."""
        return ModelList(data=self._owner.models.cards())

    async def retrieve(self, model: str) -> ModelCard:
        """Return one model. Raises UnknownModel."""
        return self._owner.models.card(model)
