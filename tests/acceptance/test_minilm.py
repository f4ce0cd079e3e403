"""A real embedding model: its vectors, from the program and from Python, equal the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from demo_model import place_demo_model
from gguf_bert import write_bert_gguf
from minilm import fetch_minilm
from program import Program
from running_server import running_server

from mlc_llm import MLCEngine
from mlc_llm.engine.config import EngineConfig

pytestmark = pytest.mark.weights

VECTORS = Path(__file__).parent.parent / "encoder_references" / "minilm.json"
ITEMS: list[dict[str, Any]] = json.loads(VECTORS.read_text())["items"]
TEXTS = [item["text"] for item in ITEMS]
EXPECTED = np.asarray([item["vector"] for item in ITEMS])


@pytest.fixture(scope="module")
def minilm() -> Path:
    return fetch_minilm()


@pytest.fixture(scope="module")
def client(program: Program, minilm: Path) -> Iterator[openai.OpenAI]:
    """A client of `mlc_llm serve` with this model alone."""
    with running_server(program, minilm, "--model-id", "minilm") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def cosines(data: Any) -> np.ndarray:
    found = np.asarray([item.embedding for item in data])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    return (found * EXPECTED).sum(axis=1)


def test_a_server_of_the_model_alone(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    assert (cosines(answer.data) > 1 - 1e-5).all()
    assert answer.usage.prompt_tokens == sum(item["num_tokens"] for item in ITEMS)
    assert [model.id for model in client.models.list()] == ["minilm"]
    plain = client.embeddings.create(model="minilm", input=TEXTS[:2], encoding_format="float")
    assert [item.embedding for item in plain.data] == [item.embedding for item in answer.data[:2]]


def test_requests_to_it(client: openai.OpenAI) -> None:
    short = client.embeddings.create(model="minilm", input=TEXTS[0], dimensions=100)
    expected = EXPECTED[0, :100] / np.linalg.norm(EXPECTED[0, :100])
    assert short.data[0].embedding @ expected > 1 - 1e-5
    long = TEXTS[6] * 3
    with pytest.raises(openai.BadRequestError, match="tokens, the model minilm takes 256"):
        client.embeddings.create(model="minilm", input=long)
    cut = {"truncate_prompt_tokens": -1}
    answer = client.embeddings.create(model="minilm", input=long, extra_body=cut)
    assert answer.usage.total_tokens == 256
    with pytest.raises(openai.NotFoundError, match="only one for embeddings"):
        client.completions.create(model="minilm", prompt="hello")


@pytest.mark.parametrize(("quantization", "cosine"), [("q8f16_1", 0.998), ("q4f16_1", 0.85)])
def test_quantized_in_python(
    program: Program,
    minilm: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
    cosine: float,
) -> None:
    for name, value in program.environment.items():
        if name.startswith("MLC_"):
            monkeypatch.setenv(name, value)
    quiet = EngineConfig(verbose=False)
    with MLCEngine(minilm, quantization=quantization, engine_config=quiet) as engine:
        answer = engine.embeddings.create(input=TEXTS)
    assert (cosines(answer.data) > cosine).all()


def test_beside_a_model_for_chats(program: Program, minilm: Path, demo_gguf: Path) -> None:
    place_demo_model(program, demo_gguf)
    with running_server(program, "--embedding-model", minilm) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["demo", str(minilm)]
            chosen = str(minilm)
            answer = client.embeddings.create(model=chosen, input=TEXTS)
            assert (cosines(answer.data) > 1 - 1e-5).all()
            said = client.completions.create(model="demo", prompt="Once", max_tokens=4)
            assert said.usage is not None and said.usage.completion_tokens == 4


def test_it_cannot_chat(program: Program, minilm: Path) -> None:
    program.refuse("chat", minilm, "--prompt", "hello", words="is a model for embeddings")


def test_as_a_gguf_file(
    program: Program, client: openai.OpenAI, minilm: Path, tmp_path: Path
) -> None:
    path = write_bert_gguf(minilm, tmp_path / "minilm.gguf", "mean", context=256)
    with running_server(program, path, "--model-id", "minilm") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
            found = other.embeddings.create(model="minilm", input=TEXTS)
    expected = client.embeddings.create(model="minilm", input=TEXTS)
    assert found.usage == expected.usage
    assert [item.embedding for item in found.data] == [item.embedding for item in expected.data]


def test_vocab_txt_is_enough(program: Program, minilm: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "artifact"
    shutil.copytree(minilm, source)
    ids = _ids_of(source)
    (source / "tokenizer.json").unlink()
    assert _ids_of(source) == ids
    program.must_run("gen_config", source, "--quantization", "q0f16", "-o", output)
    assert _ids_of(output) == ids


def _ids_of(directory: Path) -> list[list[int]]:
    from mlc_llm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    return [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
