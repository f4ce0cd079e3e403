"""`/v1/rerank` over HTTP, on an embedding model of the fake runner."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeEncodingRunner
from live_server import live_server
from served import TOKENIZER
from test_app_embeddings import VECTORS, make_config

from mlc_llm.engine.embedding import EmbeddingModel
from mlc_llm.engine.encoder import Encoder, pages_for_encoding
from mlc_llm.errors import UnknownModel
from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.options import AppOptions

PATH = "/v1/rerank"
DOCUMENTS = ["ab", "hello", "abc", "a", "hello"]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    runner = FakeEncodingRunner(pages_for_encoding(FakeEncodingRunner().metadata))
    embedding = EmbeddingModel(
        VECTORS, make_config(), TOKENIZER, Encoder(runner), is_normalized=False
    )
    traffic = Traffic()
    app = create_app(ServedModels(None, embedding), AppOptions(), traffic)
    with live_server(app, [], traffic) as live:
        with httpx.Client(base_url=live.url, timeout=20) as client:
            yield client
    embedding.close()


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": VECTORS, "query": "hello", "documents": DOCUMENTS, **fields}
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_score_is_the_cosine_of_embeddings(client: httpx.Client) -> None:
    answer = ask(client)
    vectors = client.post("/v1/embeddings", json={"input": [*DOCUMENTS, "hello"]}).json()
    *documents, query = (np.asarray(item["embedding"]) for item in vectors["data"])
    expected = [
        float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))
        for vector in documents
    ]
    places = [result["index"] for result in answer["results"]]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert places[:2] == [1, 4]  # the query itself, twice, in their order
    assert sorted(places) == [0, 1, 2, 3, 4]
    assert scores == sorted(scores, reverse=True)
    assert np.allclose(scores, [expected[place] for place in places], atol=1e-5)
    assert 0.9999 < scores[0] == scores[1] <= 1
    assert (answer["object"], answer["model"]) == ("list", VECTORS)
    assert answer["usage"]["total_tokens"] == vectors["usage"]["total_tokens"]
    assert all("document" not in result for result in answer["results"])


def test_fewer_results_and_their_texts(client: httpx.Client) -> None:
    everything = ask(client)["results"]
    documents = [{"text": text} for text in DOCUMENTS]
    best = ask(client, documents=documents, top_n=3, return_documents=True)["results"]
    assert [result["index"] for result in best] == [result["index"] for result in everything[:3]]
    for result in best:
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert len(ask(client, top_n=99)["results"]) == 5


def test_long_texts_are_refused_or_cut(client: httpx.Client) -> None:
    long = "xyz" * 100
    for fields, param in (
        ({"documents": ["a", long]}, "documents[1]"),
        ({"query": long}, "query"),
    ):
        body = {"query": "a", "documents": ["a"], **fields}
        error = client.post(PATH, json=body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert error["message"].startswith(param)
    usage = ask(client, documents=[long], query=long, truncate_prompt_tokens=4)["usage"]
    assert usage["total_tokens"] == 8
    assert ask(client, documents=[long], truncate_prompt_tokens=-1)["usage"]["total_tokens"] > 64


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": 5}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": ["a", ""]}, "documents[1]"),
        ({"documents": [{"body": "a"}]}, "documents[0].text"),
        ({"documents": ["a"] * 3000}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"return_documents": 1}, "return_documents"),
        ({"nonsense": 1}, "nonsense"),
        ({"instruction": "Find cats"}, "instruction"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"query": "a", "documents": ["a"], **fields}
    response = client.post(PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("ranks", "name", "found"),
    [
        (True, None, "chat"),
        (True, "chat", "chat"),
        (True, "vectors", "vectors"),
        (False, None, "vectors"),
        (False, "vectors", "vectors"),
        (False, "chat", "'chat' does not put documents in order; ask 'vectors' to"),
        (True, "other", "'other' is not served here"),
        (False, "other", "'other' is not served here"),
    ],
)
def test_which_model_is_asked(ranks: bool, name: str | None, found: str) -> None:
    chat: Any = SimpleNamespace(name="chat", ranking=object() if ranks else None)
    vectors: Any = SimpleNamespace(name="vectors")
    models = ServedModels(chat, vectors)
    if " " not in found:
        assert models.find_reranker(name).name == found
        return
    with pytest.raises(UnknownModel, match=found):
        models.find_reranker(name)


def test_other_models_do_not_rerank(client: httpx.Client) -> None:
    body = {"model": "other", "query": "a", "documents": ["a"]}
    assert client.post(PATH, json=body).status_code == 404
