"""Embeddings of a real small model, compiled on the fly, against the plain NumPy model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy_model import hidden_states, read_weights

from mlc_llm.artifact import read_json_object
from mlc_llm.engine.embedding import EmbeddingModel, open_embedding_model
from mlc_llm.errors import LibraryMismatch
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.jit import prepare_library
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import prepare_artifact
from mlc_llm.serve.embeddings import EmbeddingRequest, EmbeddingResponse, embed
from mlc_llm.text.tokenizer import Tokenizer

pytestmark = pytest.mark.cpu

TEXTS = ["Once upon a time", "Lily saw a big dog. " * 20, "The end."]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CacheHome:
    return CacheHome(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def artifact(stories260k: Path, home: CacheHome) -> Path:
    return prepare_artifact(
        str(stories260k),
        quantization="q0f32",
        home=home,
        download_policy=CachePolicy.ON,
        jit_policy=CachePolicy.ON,
        progress=NullProgress(),
    )


def compile_for(task: str, artifact: Path, home: CacheHome) -> Path:
    return prepare_library(
        artifact,
        device="cpu",
        opt="O2",
        overrides={"model_task": task, "prefill_chunk_size": 64},
        home=home,
        jit_policy=CachePolicy.ON,
        progress=NullProgress(),
    )


@pytest.fixture(scope="module")
def model(artifact: Path, home: CacheHome) -> Iterator[EmbeddingModel]:
    library = compile_for("embedding", artifact, home)
    model = open_embedding_model(artifact, library, name="stories")
    yield model
    model.close()


def ask(model: EmbeddingModel, given: str | list[str]) -> EmbeddingResponse:
    return asyncio.run(embed(model, EmbeddingRequest(input=given)))


def test_vectors_equal_the_reference(model: EmbeddingModel, stories260k: Path) -> None:
    """The long text takes two steps, the others share one."""
    config = read_json_object(stories260k / "config.json")
    weights = read_weights(stories260k)
    tokenizer = Tokenizer.load(stories260k)
    answer = ask(model, TEXTS)
    for item, text in zip(answer.data, TEXTS, strict=True):
        tokens = tokenizer.encode(text, add_special_tokens=True)
        expected = hidden_states(config, weights, tokens)[-1]
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(item.embedding, expected, atol=2e-5)
    assert answer.usage.total_tokens > 64


def test_a_vector_does_not_depend_on_its_company(model: EmbeddingModel) -> None:
    together = ask(model, TEXTS)
    for item, text in zip(together.data, TEXTS, strict=True):
        assert ask(model, text).data[0].embedding == item.embedding


def test_a_library_for_chats_is_refused(artifact: Path, home: CacheHome) -> None:
    library = compile_for("chat", artifact, home)
    assert library != compile_for("embedding", artifact, home)
    with pytest.raises(LibraryMismatch, match="for the task chat, not for embedding"):
        open_embedding_model(artifact, library, name="stories")
