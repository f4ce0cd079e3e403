"""langchain-openai against a server: `python langchain_client.py BASE_URL MODEL`.

Prints one line of JSON for each check: {"check": name, "problem": null or text}.
"""

from __future__ import annotations

import asyncio
import sys

import openai
from checks import run_checks
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

BASE_URL, MODEL = sys.argv[1:3]
SERVER = {"base_url": BASE_URL, "api_key": "none", "model": MODEL, "max_retries": 0}
QUESTION = "Name three colours and say why."
chat = ChatOpenAI(**SERVER, temperature=0, max_tokens=16)


def invoke() -> None:
    answer = chat.invoke([("system", "You are brief."), ("human", QUESTION)])
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 16
    assert answer.response_metadata["finish_reason"] == "length"


def stream() -> None:
    pieces = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == chat.invoke(QUESTION).content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata)


def batch() -> None:
    questions = ["Name a fruit.", "Name a tree.", "Name a river."]
    answers = [answer.content for answer in chat.batch(questions)]
    assert answers == [chat.invoke(question).content for question in questions]


def asynchronous() -> None:
    assert asyncio.run(chat.ainvoke(QUESTION)).content == chat.invoke(QUESTION).content


def logprobs() -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == answer.content


def stop() -> None:
    text = chat.invoke(QUESTION).content
    assert chat.invoke(QUESTION, stop=[text[10:16]]).content == text[: text.index(text[10:16])]


def completions() -> None:
    model = OpenAI(**SERVER, temperature=0, max_tokens=8)
    assert model.invoke("Once upon a time")
    assert "".join(model.stream("Once upon a time")) == model.invoke("Once upon a time")


def errors() -> None:
    try:
        chat.bind(top_p=7).invoke(QUESTION)
    except openai.BadRequestError as error:
        assert error.param == "top_p"
    else:
        raise AssertionError("top_p=7 was taken")
    embeddings = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False)
    try:
        embeddings.embed_query("text")
    except openai.NotFoundError:
        return
    raise AssertionError("there is no model for embeddings")


run_checks([invoke, stream, batch, asynchronous, logprobs, stop, completions, errors])
