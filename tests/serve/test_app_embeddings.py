"""`/v1/embeddings` over HTTP, on an embedding model of the fake runner."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from fakes import HIDDEN_SIZE, VOCAB_SIZE, FakeEncodingRunner
from live_server import live_server
from served import MODEL, TOKENIZER, make_model, make_runner

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.embedding import EmbeddingModel
from mlc_llm.engine.encoder import Encoder, pages_for_encoding
from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.options import AppOptions

VECTORS = "vectors"


def make_config() -> ChatConfig:
    return ChatConfig(
        model_type="llama",
        quantization="q4f16_1",
        model_config={"hidden_size": HIDDEN_SIZE},
        vocab_size=VOCAB_SIZE,
        context_window_size=64,
        prefill_chunk_size=8,
        conv_template={},
    )


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    runner = FakeEncodingRunner(pages_for_encoding(FakeEncodingRunner().metadata))
    embedding = EmbeddingModel(VECTORS, make_config(), TOKENIZER, Encoder(runner))
    model = make_model(make_runner())
    traffic = Traffic()
    app = create_app(ServedModels(model, embedding), AppOptions(), traffic)
    with live_server(app, [model.worker], traffic) as live:
        with openai.OpenAI(
            base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client:
            yield client
    embedding.close()


def test_vectors_come_in_order(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=VECTORS, input=["hello", "world", "hello"])
    assert [item.index for item in answer.data] == [0, 1, 2]
    first, second, third = (np.asarray(item.embedding) for item in answer.data)
    assert first.shape == (HIDDEN_SIZE,)
    assert np.isclose(np.linalg.norm(first), 1, atol=1e-5)
    assert np.array_equal(first, third) and not np.array_equal(first, second)
    assert answer.model == VECTORS
    assert answer.usage.prompt_tokens > 0


def test_both_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, VECTORS]
    assert client.models.retrieve(VECTORS).id == VECTORS


def test_models_are_not_mistaken_for_each_other(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="hello")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=VECTORS, prompt="hello")


def test_what_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model=VECTORS, input="xyz" * 100)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model=VECTORS, input=[])
    assert empty.value.param == "input"


def test_a_server_of_vectors_alone() -> None:
    runner = FakeEncodingRunner(pages_for_encoding(FakeEncodingRunner().metadata))
    embedding = EmbeddingModel(VECTORS, make_config(), TOKENIZER, Encoder(runner))
    traffic = Traffic()
    app = create_app(ServedModels(None, embedding), AppOptions(enable_debug=True), traffic)
    with live_server(app, [], traffic) as live:
        with httpx.Client(base_url=live.url, timeout=20) as client:
            answer = client.post("/v1/embeddings", json={"input": ["hello", "world"]}).json()
            assert [item["index"] for item in answer["data"]] == [0, 1]
            cards = client.get("/v1/models").json()["data"]
            assert [(card["id"], card["max_model_len"]) for card in cards] == [(VECTORS, 64)]
            for path in ("/health", "/ready", "/metrics", "/v1/models/" + VECTORS):
                assert client.get(path).status_code == 200, path
            refused = [
                client.post("/v1/completions", json={"prompt": "hello", "model": VECTORS}),
                client.post("/tokenize", json={"prompt": "hello"}),
                client.post("/debug/reset_engine", json={}),
            ]
            for response in refused:
                assert response.status_code == 404
                assert "only one for embeddings" in response.json()["error"]["message"]
            embedding.close()
            assert client.get("/health").status_code == 503
            assert client.post("/v1/embeddings", json={"input": "hello"}).status_code == 503


def test_inputs_are_cut_only_when_asked(client: openai.OpenAI) -> None:
    cut = client.embeddings.create(
        model=VECTORS, input="xyz" * 100, extra_body={"truncate_prompt_tokens": -1}
    )
    assert cut.usage.prompt_tokens == 64
