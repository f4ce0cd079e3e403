"""`response_format` over HTTP: what is asked for comes, and what is wrong is said.

What is hostile is in test_hostile_formats.py.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import MODEL, Served, served

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [7, 77]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALL = {"begin": "<c=add>", "schema": PERSON, "end": "</c>"}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(context=1024) as server:
        yield server


def ask(server: Served, response_format: Any, **fields: Any) -> Any:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100,
        "response_format": response_format,
        **fields,
    }
    return server.client.post("/v1/chat/completions", json=body)


def answer(server: Served, response_format: Any, **fields: Any) -> str:
    response = ask(server, response_format, **fields)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    text: str = choice["message"]["content"]
    return text


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        {
            "type": "json_schema",
            "json_schema": {"name": "p", "schema": PERSON, "strict": True, "description": "who"},
        },
        {"type": "json_object", "schema": json.dumps(PERSON)},
        {"type": "json_object", "schema": PERSON},
    ],
)
@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"temperature": 2, "seed": 5}])
def test_schemas(server: Served, response_format: Any, fields: dict[str, Any]) -> None:
    value = json.loads(answer(server, response_format, **fields))
    assert list(value) == ["name", "age"] and value["age"] in (7, 77)


@pytest.mark.parametrize(
    ("response_format", "pattern"),
    [
        ({"type": "text"}, None),
        ({"type": "regex", "regex": r"[0-9]{3}-[ab]{2}"}, r"\d{3}-[ab]{2}"),
        ({"type": "choice", "choice": ["maybe", "never"]}, "maybe|never"),
        ({"type": "grammar", "grammar": 'start: "<" /[a-c]{4}/ ">"'}, "<[a-c]{4}>"),
        ({"type": "grammar", "grammar": 'root ::= [xy] [xy] end\nend ::= "."'}, r"[xy]{2}\."),
    ],
)
def test_other_formats(server: Served, response_format: Any, pattern: str | None) -> None:
    if pattern is None:
        assert ask(server, response_format).json()["choices"][0]["finish_reason"] == "length"
    else:
        text = answer(server, response_format, temperature=1.5, seed=2)
        assert re.fullmatch(pattern, text), text


def test_any_object(server: Served) -> None:
    for seed in range(6):
        choice = ask(server, {"type": "json_object"}, seed=seed).json()["choices"][0]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert text.startswith("{")


def test_completions_and_streams(server: Served) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    fields = {"max_tokens": 100, "response_format": schema, "seed": 4}
    response = server.answer(["hell", "o"], n=2, **fields)
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert len(texts) == 4 and all(json.loads(text)["age"] in (7, 77) for text in texts)

    pieces = []
    body = {"model": MODEL, "prompt": "hell", "stream": True, **fields}
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert "".join(pieces) == texts[0]


def test_structural_tags_hold_where_their_trigger_came(server: Served) -> None:
    tags = {"type": "structural_tag", "structures": [CALL], "triggers": ["<c="]}
    # The likeliest letters are pushed aside so that the trigger comes at once.
    ids = {text: server_token(text) for text in "<c="}
    bias = {ids["<"]: 60}
    text = ask(server, tags, max_tokens=60, logit_bias=bias).json()["choices"][0]["message"]
    assert "<" in text["content"] and "<c=" not in text["content"].replace("<c=add>", "")


def server_token(text: str) -> int:
    from served import TOKENIZER

    return TOKENIZER.encode(text)[0]


@pytest.mark.parametrize(
    ("response_format", "message", "param"),
    [
        ({"type": "xml"}, "xml", "response_format"),
        ({}, "discriminator", "response_format"),
        ({"type": "json_schema"}, "required", "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "pattern",
            "response_format.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a"}},
            "required",
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}},
            "schema.not is a keyword that is not supported",
            "response_format",
        ),
        ({"type": "json_object", "schema": "{"}, "not JSON", "response_format"),
        ({"type": "regex", "regex": "(a"}, "cannot be used", "response_format"),
        ({"type": "regex", "regex": r"(a)\1"}, "backreferences", "response_format"),
        ({"type": "choice", "choice": []}, "at least 1", "response_format.choice"),
        ({"type": "choice", "choice": ["a", ""]}, "at least 1", "response_format.choice[1]"),
        ({"type": "grammar", "grammar": "start: nope"}, "cannot be used", "response_format"),
        ({"type": "grammar", "grammar": "root ::= nope"}, "nope", "response_format"),
        (
            {"type": "structural_tag", "structures": [CALL], "triggers": ["<d="]},
            "begins with no trigger",
            "response_format",
        ),
        ({"type": "text", "regex": "a"}, "extra", "response_format.regex"),
    ],
)
def test_what_is_wrong_is_said(
    server: Served, response_format: Any, message: str, param: str
) -> None:
    response = ask(server, response_format)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert message.lower() in error["message"].lower(), error["message"]
    assert error["param"] == param


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def test_others_go_on_while_a_format_is_read(server: Served) -> None:
    """One that takes for ever holds up neither free answers nor formats that are known."""
    known = {"type": "choice", "choice": ["known"]}
    assert answer(server, known) == "known"
    cache = server.worker.engine.grammars
    assert cache is not None
    is_reading, may_end = threading.Event(), threading.Event()
    read = cache._reader.read

    def read_slowly(*key: Any) -> Any:
        is_reading.set()
        assert may_end.wait(60)
        return read(*key)

    cache._reader.read = read_slowly  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(answer, server, {"type": "choice", "choice": ["slow"]})
            assert is_reading.wait(60)
            server.assert_works()
            assert answer(server, known) == "known"
            assert not slow.done()
            may_end.set()
            assert slow.result(60) == "slow"
    finally:
        may_end.set()
        cache._reader.read = read  # type: ignore[method-assign]


def test_a_refusal_is_remembered(server: Served) -> None:
    hostile = schema_format({"type": "integer", "multipleOf": 999979})
    assert ask(server, hostile).status_code == 400
    cache = server.worker.engine.grammars
    assert cache is not None
    reads: list[Any] = []
    read, cache._reader.read = cache._reader.read, lambda *key: reads.append(key)  # type: ignore
    try:
        assert ask(server, hostile).status_code == 400
    finally:
        cache._reader.read = read  # type: ignore[method-assign]
    assert not reads


def test_the_api_names_all_formats(server: Served) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    mapping = json.dumps(schemas["ChatCompletionRequest"]["properties"]["response_format"])
    for kind in ("text", "json_object", "json_schema", "grammar", "regex", "choice"):
        assert f'"{kind}"' in mapping
    assert "StructuralTagFormat" in schemas
