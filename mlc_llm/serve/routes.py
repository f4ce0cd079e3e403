"""What each route does: read the request, let it be answered, write the answer.

The answers are made by functions that know no HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, RootModel, StrictStr
from starlette.requests import Request
from starlette.responses import Response

import mlc_llm
from mlc_llm.engine.exposition import prometheus_text
from mlc_llm.errors import EngineStopped, RequestError
from mlc_llm.serve.anthropic import (
    MESSAGE_EVENTS,
    MESSAGE_PREFIX,
    answer,
    answer_stream,
    count_tokens,
)
from mlc_llm.serve.body import read_body
from mlc_llm.serve.catalog import ModelCard, ModelList, ServedModels
from mlc_llm.serve.chat import chat, chat_stream
from mlc_llm.serve.chat_page import ChatPage
from mlc_llm.serve.completions import complete, complete_stream
from mlc_llm.serve.embeddings import EmbeddingRequest, EmbeddingResponse, embed
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.openapi import describe
from mlc_llm.serve.protocol.anthropic import CountTokensRequest, MessagesRequest
from mlc_llm.serve.protocol.anthropic_answer import AnthropicMessage, MessageEvent, TokenCount
from mlc_llm.serve.protocol.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from mlc_llm.serve.protocol.completions import Completion, CompletionRequest
from mlc_llm.serve.protocol.generation import GenerationRequest
from mlc_llm.serve.protocol.response_events import Response as ResponseAnswer
from mlc_llm.serve.protocol.response_events import ResponseEvent
from mlc_llm.serve.protocol.responses import ResponseRequest
from mlc_llm.serve.rerank import RerankRequest, RerankResponse, rerank
from mlc_llm.serve.responses import RESPONSE_EVENTS, RESPONSE_PREFIX, respond, respond_stream
from mlc_llm.serve.sse import start_events, while_connected
from mlc_llm.serve.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    detokenize,
    tokenize,
)


class Status(BaseModel):
    """How the server is."""

    status: str


class Version(BaseModel):
    """Which release this is."""

    version: str


class EngineSums(RootModel[dict[str, Any]]):
    """The engine's metrics by MLC LLM's names."""


class ModelChoice(BaseModel):
    """Which model is meant."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None


# What is described in /openapi.json.
BODIES = (
    ChatCompletionRequest,
    CompletionRequest,
    ResponseRequest,
    MessagesRequest,
    CountTokensRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ModelChoice,
)
ANSWERS = (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ResponseAnswer,
    ResponseEvent,
    AnthropicMessage,
    MessageEvent,
    TokenCount,
    EmbeddingResponse,
    RerankResponse,
    TokenizeResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    Status,
    Version,
    EngineSums,
)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_MODEL_ID = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}

Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    """The routes of one server; with has_debug those for debugging too, and debug_config."""

    def __init__(
        self, models: ServedModels, traffic: Traffic, send_timeout_s: float, *, has_debug: bool
    ) -> None:
        self._models = models
        self._traffic = traffic
        self._send_timeout_s = send_timeout_s
        self._has_debug = has_debug
        self._page = ChatPage()

    def add_to(self, app: FastAPI) -> None:
        """Add every route to an application."""

        def add(method: str, path: str, handler: Handler, described: dict[str, Any]) -> None:
            app.add_api_route(
                path,
                handler,
                methods=[method],
                response_model=None,
                response_class=Response,
                openapi_extra=described,
            )

        answers = describe(ChatCompletion, ChatCompletionRequest, chunk=ChatCompletionChunk)
        add("POST", "/v1/chat/completions", self.chat_completions, answers)
        texts = describe(Completion, CompletionRequest, chunk=Completion)
        add("POST", "/v1/completions", self.completions, texts)
        responses = describe(ResponseAnswer, ResponseRequest, chunk=ResponseEvent, api="responses")
        add("POST", "/v1/responses", self.responses, responses)
        messages = describe(AnthropicMessage, MessagesRequest, chunk=MessageEvent, api="anthropic")
        add("POST", "/v1/messages", self.messages, messages)
        count = describe(TokenCount, CountTokensRequest, api="anthropic")
        add("POST", "/v1/messages/count_tokens", self.count_tokens, count)
        vectors = describe(EmbeddingResponse, EmbeddingRequest)
        add("POST", "/v1/embeddings", self.embeddings, vectors)
        add("POST", "/v1/rerank", self.rerank, describe(RerankResponse, RerankRequest))
        add("GET", "/v1/models", self.list_models, describe(ModelList))
        card = describe(ModelCard, also=[404], parameters=[_MODEL_ID])
        add("GET", "/v1/models/{model_id:path}", self.get_model, card)
        tokens = describe(TokenizeResponse, TokenizeRequest)
        add("POST", "/tokenize", self.tokenize, tokens)
        add("POST", "/detokenize", self.detokenize, describe(DetokenizeResponse, DetokenizeRequest))
        add("GET", "/health", self.health, describe(Status, needs_key=False))
        add("GET", "/ready", self.ready, describe(Status))
        add("GET", "/version", self.version, describe(Version))
        add("GET", "/metrics", self.metrics, describe("text/plain"))
        app.add_route("/", self.page, include_in_schema=False)
        app.add_route("/docs", self.api_page, include_in_schema=False)
        app.add_route("/page/{name}", self.page, include_in_schema=False)
        if self._has_debug:
            sums = describe(EngineSums, ModelChoice)
            add("POST", "/debug/dump_engine_metrics", self.dump_metrics, sums)
            done = describe(Status, ModelChoice)
            add("POST", "/debug/reset_engine", self.reset_engine, done)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatCompletionRequest)
        self._check_debug(body)
        model = self._models.find_chat(body.model)
        if body.stream:
            chunks = chat_stream(model, body, _new_id())
            return await start_events(request, chunks, self._send_timeout_s)
        return _json(await while_connected(request.receive, chat(model, body, _new_id())))

    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        body = await read_body(request, CompletionRequest)
        self._check_debug(body)
        model = self._models.find_chat(body.model)
        if body.stream:
            chunks = complete_stream(model, body, _new_id())
            return await start_events(request, chunks, self._send_timeout_s)
        return _json(await while_connected(request.receive, complete(model, body, _new_id())))

    async def responses(self, request: Request) -> Response:
        """Respond to items of a conversation."""
        body = await read_body(request, ResponseRequest)
        model = self._models.find_chat(body.model)
        request_id = RESPONSE_PREFIX + _new_id()
        if body.stream:
            events = respond_stream(model, body, request_id)
            return await start_events(request, events, self._send_timeout_s, RESPONSE_EVENTS)
        return _json(await while_connected(request.receive, respond(model, body, request_id)))

    async def messages(self, request: Request) -> Response:
        """Answer a conversation, in Anthropic's protocol."""
        body = await read_body(request, MessagesRequest)
        model = self._models.find_chat(body.model)
        request_id = MESSAGE_PREFIX + _new_id()
        if body.stream:
            events = answer_stream(model, body, request_id)
            return await start_events(request, events, self._send_timeout_s, MESSAGE_EVENTS)
        return _json(await while_connected(request.receive, answer(model, body, request_id)))

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of a conversation, in Anthropic's protocol."""
        body = await read_body(request, CountTokensRequest)
        model = self._models.find_chat(body.model)
        return _json(await while_connected(request.receive, count_tokens(model, body)))

    def _check_debug(self, body: GenerationRequest) -> None:
        if body.debug_config is not None and not self._has_debug:
            raise RequestError(
                "debug_config is for servers started with --enable-debug; leave it out "
                "(ignore_eos is a field of its own)",
                "debug_config",
            )

    async def embeddings(self, request: Request) -> Response:
        """Turn texts into vectors."""
        body = await read_body(request, EmbeddingRequest)
        model = self._models.find_embedding(body.model)
        return _json(await while_connected(request.receive, embed(model, body)))

    async def rerank(self, request: Request) -> Response:
        """Put documents in the order in which they fit a query."""
        body = await read_body(request, RerankRequest)
        model = self._models.find_reranker(body.model)
        return _json(await while_connected(request.receive, rerank(model, body)))

    async def list_models(self, request: Request) -> Response:
        """List the models that are served."""
        return _json(ModelList(data=self._models.cards()))

    async def get_model(self, request: Request) -> Response:
        """Describe a model."""
        return _json(self._models.card(request.path_params["model_id"]))

    async def tokenize(self, request: Request) -> Response:
        """Turn text or messages into token ids."""
        body = await read_body(request, TokenizeRequest)
        return _json(await tokenize(self._models.find_chat(body.model), body))

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        body = await read_body(request, DetokenizeRequest)
        return _json(await detokenize(self._models.find_chat(body.model), body))

    async def health(self, request: Request) -> Response:
        """Say whether the engine lives."""
        if self._models.chat is not None:
            worker = self._models.chat.worker
            if worker.state not in ("running", "draining"):
                raise EngineStopped(f"the engine is {worker.state}; start the server again")
            if worker.is_stuck:
                raise EngineStopped("the engine has not finished its step for too long")
        if self._models.embedding is not None:
            self._models.embedding.check_open()
        return _json(Status(status="ok"))

    async def ready(self, request: Request) -> Response:
        """Say whether requests are taken."""
        chat = self._models.chat
        is_draining = chat is not None and chat.worker.state == "draining"
        if self._traffic.is_draining or is_draining:
            raise EngineStopped("the server is shutting down; ask another one")
        return await self.health(request)

    async def version(self, request: Request) -> Response:
        """Tell which release this is."""
        return _json(Version(version=mlc_llm.__version__))

    async def metrics(self, request: Request) -> Response:
        """Show counts and times in Prometheus' text format."""
        model = self._models.chat
        engines = {} if model is None else {model.name: model.worker.engine.metrics}
        text = prometheus_text(engines) + self._traffic.prometheus_text()
        return Response(text, media_type=_PROMETHEUS)

    async def dump_metrics(self, request: Request) -> Response:
        """Show the engine's sums by MLC LLM's names."""
        body = await read_body(request, ModelChoice)
        worker = self._models.find_chat(body.model).worker
        sums = await worker.run(lambda engine: engine.metrics.to_dict())
        return _json(EngineSums(sums))

    async def reset_engine(self, request: Request) -> Response:
        """Forget earlier prompts; requests under way go on."""
        body = await read_body(request, ModelChoice)
        worker = self._models.find_chat(body.model).worker
        await worker.run(lambda engine: engine.reset_prefix_cache())
        return _json(Status(status="ok"))

    async def page(self, request: Request) -> Response:
        """Show the chat page."""
        return self._page.answer(request.path_params.get("name", "index.html"))

    async def api_page(self, request: Request) -> Response:
        """Show what the server takes and answers."""
        return self._page.answer("api.html")


def _new_id() -> str:
    return uuid.uuid4().hex


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
