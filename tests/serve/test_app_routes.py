"""Every route over HTTP, with the official client where it has a name for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import MODEL, TOKENIZER, Served, served

import mlc_llm
from mlc_llm.serve.options import AppOptions


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(options=AppOptions(enable_debug=True)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content is not None and len(choice.message.content) == 5
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_a_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "length"
    assert pieces[0].choices[0].delta.role == "assistant"
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 9


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["hello", "he"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.text) == 4 for choice in answer.choices)
    tokens = TOKENIZER.encode("hello")
    same = client.completions.create(model=MODEL, prompt=tokens, max_tokens=4)
    assert same.choices[0].text == answer.choices[0].text


def test_a_streamed_completion_says_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="hello", max_tokens=9)
    chunks = client.completions.create(model=MODEL, prompt="hello", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_model_may_be_left_out(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1})
    assert response.status_code == 200
    assert response.json()["model"] == MODEL


def test_models(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == [MODEL]
    assert models[0].owned_by == "mlc_llm"
    assert client.models.retrieve(MODEL).created == models[0].created


def test_errors_are_the_classes_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=HELLO)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("HF://other/model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="xyz" * 500)
    assert long.value.code == "context_length_exceeded"


def test_an_error_before_the_first_chunk_has_its_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="xyz" * 500, stream=True)
    assert long.value.code == "context_length_exceeded"


def test_embeddings_need_their_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="--embedding-model"):
        client.embeddings.create(model="any", input="hello")


def test_tokens_and_back(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "hello wörld", "return_token_strs": True}
    answer = http.post("/tokenize", json=body).json()
    assert answer["tokens"] == TOKENIZER.encode("hello wörld", True)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][0] == "hell"
    assert len(answer["token_strs"]) == answer["count"]
    back = http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "hello wörld"}


def test_messages_become_tokens(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"messages": HELLO}).json()
    assert "hello" in TOKENIZER.decode(answer["tokens"])
    assert answer["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/tokenize", {"messages": [{}]}, None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [3, 10**6]}, "tokens[1]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_wrong_fields_are_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok"}
    assert http.get("/version").json() == {"version": mlc_llm.__version__}


def test_metrics_count_what_happened(server: Served) -> None:
    generated = server.metric("generation_tokens_total")
    answers = server.metric("http_requests_total", handler="/v1/completions", status="200")
    server.answer(max_tokens=6)
    assert server.metric("generation_tokens_total") == generated + 6
    after = server.metric("http_requests_total", handler="/v1/completions", status="200")
    assert after == answers + 1


def test_paths_of_clients_make_no_metrics(server: Served) -> None:
    for number in range(3):
        assert httpx.get(f"{server.url}/nowhere/{number}").status_code == 404
    text = httpx.get(f"{server.url}/metrics").text
    assert "nowhere" not in text
    assert 'handler="unmatched",status="404"' in text


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat/completions/", "//v1/models"])
def test_what_is_not_there(http: httpx.Client, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")


def test_methods_that_a_route_has_not(http: httpx.Client) -> None:
    response = http.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert http.request("TRACE", "/health").status_code == 405


def test_the_page_and_its_policy(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for name, kind in (("chat.js", "text/javascript"), ("chat.css", "text/css")):
        assert name in page.text
        assert http.get(f"/page/{name}").headers["content-type"].startswith(kind)


@pytest.mark.parametrize("name", ["nothing.js", "..%2f..%2froutes.py", "__init__.py", ""])
def test_the_page_has_no_other_files(http: httpx.Client, name: str) -> None:
    assert http.get(f"/page/{name}").status_code == 404


def test_debug_routes(server: Served, http: httpx.Client) -> None:
    server.answer(max_tokens=1)
    sums = http.post("/debug/dump_engine_metrics", json={"model": MODEL}).json()
    assert sums["completion_tokens_sum"] >= 1
    assert http.post("/debug/reset_engine", json={}).json() == {"status": "ok"}
    again = server.answer(max_tokens=1).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] == 0


def test_debug_routes_are_there_on_demand_only() -> None:
    with served() as running:
        assert httpx.post(f"{running.url}/debug/reset_engine", json={}).status_code == 404


def test_openapi_describes_every_route(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    paths = schema["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        operation = paths[path]["post"]
        assert set(operation["responses"]) == {
            "200", "400", "401", "403", "404", "408", "413", "429", "431", "500", "503"
        }  # fmt: skip
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.rpartition("/")[2] in schema["components"]["schemas"]
    assert "404" in paths["/v1/models/{model_id}"]["get"]["responses"]
    assert not references_in(schema) - {
        f"#/components/schemas/{name}" for name in schema["components"]["schemas"]
    }


def test_pages_name_no_other_server(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    files = set(re.findall(r'(?:href|src)="([^"]+)"', page.text))
    assert {"page/api.js", "page/api.css", "openapi.json"} <= files
    for name in files | {"", "page/chat.js", "page/chat.css"}:
        response = http.get(f"/{name}")
        assert response.status_code == 200, name
        assert not re.search(r"(https?:)?//[a-z]", response.text.replace("http://www.w3.org/", ""))


def references_in(value: Any) -> set[str]:
    """Return all `$ref`s of a JSON value."""
    if isinstance(value, list):
        return set().union(*map(references_in, value))
    if not isinstance(value, dict):
        return set()
    own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
    return own.union(*map(references_in, value.values()))


def test_the_key_covers_everything_but_health() -> None:
    with served(options=AppOptions(api_key="sk-1")) as running:
        for path in ("/", "/v1/models", "/metrics", "/docs", "/openapi.json", "/version", "/ready"):
            response = httpx.get(f"{running.url}{path}")
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{running.url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="no", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="sk-1") as client:
            assert client.models.list().data[0].id == MODEL
        # The fixture reads the gauges, which need the key here.
        headers = {"authorization": "Bearer sk-1"}
        assert httpx.get(f"{running.url}/metrics", headers=headers).status_code == 200


def test_events_are_compact_json(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        data = event.removeprefix("data: ")
        assert json.dumps(json.loads(data), separators=(",", ":"), ensure_ascii=False) == data


@pytest.mark.parametrize(
    ("path", "fields"),
    [("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "hello"})],
)
def test_debug_config_is_for_servers_with_debugging(
    http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    body = {**fields, "max_tokens": 2, "debug_config": {"ignore_eos": True}}
    assert http.post(f"/v1/{path}", json=body).status_code == 200
    with served() as plain, httpx.Client(base_url=plain.url, timeout=20) as other:
        for stream in (False, True):
            refused = other.post(f"/v1/{path}", json={**body, "stream": stream})
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["param"] == "debug_config" and "--enable-debug" in error["message"]
        null = {**body, "debug_config": None}
        assert other.post(f"/v1/{path}", json=null).status_code == 200
