"""A chat with a scripted model, without HTTP."""

from __future__ import annotations

from typing import Any

from mlc_llm.serve.chat import chat_stream
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.protocol.chat import (
    ChatCompletionChunk,
    ChatCompletionRequest,
)


def ask(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "hello"}]
    return ChatCompletionRequest.model_validate({"messages": messages, **fields})


async def stream(model: ServedModel, **fields: Any) -> list[ChatCompletionChunk]:
    chunks = await chat_stream(model, ask(stream=True, **fields), "r")
    return [chunk async for chunk in chunks]


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )
