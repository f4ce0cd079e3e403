"""Embeddings without HTTP: kinds of input, order, lengths, bounds, and what happens in trouble."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import HIDDEN_SIZE, VOCAB_SIZE, FakeEncodingRunner, hidden_state
from pydantic import ValidationError
from small_tokenizers import write_tokenizer

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.embedding import EmbeddingModel
from mlc_llm.engine.encoder import Encoder, Pooling, pages_for_encoding
from mlc_llm.errors import (
    ContextTooLong,
    EngineStopped,
    QueueFull,
    RequestError,
    StepFailed,
)
from mlc_llm.serve.embeddings import EmbeddingRequest, EmbeddingResponse, embed
from mlc_llm.text.tokenizer import Tokenizer

END_ID = 2

OpenModel = Callable[..., tuple[EmbeddingModel, FakeEncodingRunner]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def open_model(tokenizer: Tokenizer) -> Iterator[OpenModel]:
    """Return a maker of models on the fake runner; they are closed afterwards."""
    models = []

    def make(
        max_queued_requests: int = 8,
        pooling: Pooling = "last",
        task: str = "chat",
        tokenizer: Tokenizer = tokenizer,
        **options: Any,
    ) -> tuple[EmbeddingModel, FakeEncodingRunner]:
        config = ChatConfig(
            model_type="llama",
            quantization="q4f16_1",
            model_config={"hidden_size": HIDDEN_SIZE},
            vocab_size=VOCAB_SIZE,
            context_window_size=64,
            prefill_chunk_size=8,
            conv_template={},
            eos_token_id=[END_ID, 1],
            model_task=task,
        )
        runner = FakeEncodingRunner(pages_for_encoding(FakeEncodingRunner().metadata))
        encoder = Encoder(runner, pooling=pooling)
        model = EmbeddingModel(
            "tiny", config, tokenizer, encoder, max_queued_requests=max_queued_requests, **options
        )
        models.append(model)
        return model, runner

    yield make
    for model in models:
        model.close()


def ask(model: EmbeddingModel, /, **fields: Any) -> EmbeddingResponse:
    return asyncio.run(embed(model, EmbeddingRequest.model_validate(fields)))


def unit(tokens: list[int], dimensions: int = HIDDEN_SIZE) -> np.ndarray:
    state = hidden_state(tokens)[:dimensions]
    return state / np.linalg.norm(state)


@pytest.mark.parametrize(
    ("given", "is_text"),
    [
        ("hello", True),
        (["hello", "he", "hello"], True),
        ([5, 6, 7], False),
        ([[5], [9, 8]], False),
    ],
)
def test_every_kind_of_input(
    open_model: OpenModel, tokenizer: Tokenizer, given: Any, is_text: bool
) -> None:
    model, _ = open_model()
    if is_text:
        texts = [given] if isinstance(given, str) else given
        inputs = [tokenizer.encode(text) for text in texts]
    else:
        inputs = given if isinstance(given[0], list) else [given]
    answer = ask(model, input=given, model="anything")
    assert [item.index for item in answer.data] == list(range(len(inputs)))
    for item, tokens in zip(answer.data, inputs, strict=True):
        np.testing.assert_allclose(item.embedding, unit(tokens), rtol=1e-6)
    assert answer.usage.prompt_tokens == sum(map(len, inputs)) == answer.usage.total_tokens
    assert answer.object == "list" and answer.model == "tiny"


def test_base64_holds_the_same_numbers(open_model: OpenModel) -> None:
    model, _ = open_model()
    plain = ask(model, input=[[1, 2, 3]]).data[0].embedding
    packed = ask(model, input=[[1, 2, 3]], encoding_format="base64").data[0].embedding
    assert isinstance(packed, str)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), plain)


def test_dimensions_shorten_vectors_to_length_1(open_model: OpenModel) -> None:
    model, _ = open_model()
    vector = ask(model, input=[[1, 2, 3]], dimensions=3).data[0].embedding
    np.testing.assert_allclose(vector, unit([1, 2, 3], 3), rtol=1e-6)
    with pytest.raises(RequestError, match="dimensions is 9, the vectors of tiny have 8") as caught:
        ask(model, input="hello", dimensions=9)
    assert caught.value.param == "dimensions"


def test_a_model_may_want_its_vectors_as_they_are(open_model: OpenModel) -> None:
    model, _ = open_model(is_normalized=False)
    vector = ask(model, input=[[4, 5]]).data[0].embedding
    np.testing.assert_array_equal(np.asarray(vector, np.float32), hidden_state([4, 5]))


def test_a_model_that_pools_by_the_last_token_gets_an_end(
    open_model: OpenModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("hello")
    for pooling, task, expected in [
        ("last", "embedding", [*ids, END_ID]),
        ("mean", "embedding", ids),
        ("last", "chat", ids),
    ]:
        model, _ = open_model(pooling=pooling, task=task)
        assert model.token_ids("hello") == expected
    model, _ = open_model(pooling="last", task="embedding")
    assert model.token_ids("hello", 2) == [ids[0], END_ID]
    assert ask(model, input="hello").usage.total_tokens == len(ids) + 1


def test_inputs_are_cut_when_asked(open_model: OpenModel, tokenizer: Tokenizer) -> None:
    model, _ = open_model()
    text, ids = "xyz" * 100, [7] * 70
    cut = ask(model, input=[text, "he"], truncate_prompt_tokens=-1)
    assert cut.usage.total_tokens == 64 + len(tokenizer.encode("he"))
    np.testing.assert_allclose(cut.data[0].embedding, unit(tokenizer.encode(text)[:64]), rtol=1e-6)
    assert ask(model, input=[ids], truncate_prompt_tokens=5).usage.total_tokens == 5
    with pytest.raises(ContextTooLong, match="truncate_prompt_tokens=-1"):
        ask(model, input=[ids], truncate_prompt_tokens=65)


def test_special_tokens_survive_a_cut(open_model: OpenModel, tmp_path: Path) -> None:
    letters = "".join(f"{letter}\n" for letter in "abcdefgh")
    (tmp_path / "vocab.txt").write_text(f"[PAD]\n[UNK]\n[CLS]\n[SEP]\n{letters}")
    model, _ = open_model(tokenizer=Tokenizer.load(tmp_path), pooling="cls", task="embedding")
    whole = model.token_ids("a b c d e")
    assert whole == [2, 4, 5, 6, 7, 8, 3]
    assert model.token_ids("a b c d e", 7) == whole
    assert model.token_ids("a b c d e", 5) == [2, 4, 5, 6, 3]
    assert model.token_ids("a b c d e", 1) == [3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "input 0 is empty"),
        ([], "there is no input"),
        (["hello", ""], "input 1 is empty"),
        ([[]], "input 0 is empty"),
        ([[1], []], "input 1 is empty"),
        ([1, -1], "token id -1"),
        ([[VOCAB_SIZE]], f"token id {VOCAB_SIZE}"),
        ("half of a pair: \ud800", "surrogate"),
    ],
)
def test_inputs_that_cannot_be_embedded(open_model: OpenModel, given: Any, message: str) -> None:
    model, runner = open_model()
    with pytest.raises(RequestError, match=message):
        ask(model, input=given)
    assert not runner.steps


def test_an_input_longer_than_the_context(open_model: OpenModel) -> None:
    model, _ = open_model()
    assert ask(model, input=[7] * 64).usage.total_tokens == 64
    with pytest.raises(ContextTooLong, match="input 0 has 65 tokens, the model tiny takes 64"):
        ask(model, input=[7] * 65)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": None},
        {"input": 5},
        {"input": [1, "a"]},
        {"input": [True]},
        {"input": [1.5]},
        {"input": ["a"] * 2049},
        {"input": "a", "encoding_format": "hex"},
        {"input": "a", "dimensions": 0},
        {"input": "a", "dimensions": True},
        {"input": "a", "truncate_prompt_tokens": 0},
        {"input": "a", "truncate_prompt_tokens": -2},
        {"input": "a", "truncate_prompt_tokens": "5"},
        {"input": "a", "prompt": "b"},
    ],
)
def test_malformed_requests(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EmbeddingRequest.model_validate(fields)


def test_requests_at_once_get_their_own_vectors(open_model: OpenModel) -> None:
    model, _ = open_model()

    async def ask_all() -> list[EmbeddingResponse]:
        requests = [EmbeddingRequest(input=[[n, n + 1], [n]]) for n in range(8)]
        return await asyncio.gather(*(embed(model, request) for request in requests))

    for n, answer in enumerate(asyncio.run(ask_all())):
        np.testing.assert_allclose(answer.data[0].embedding, unit([n, n + 1]), rtol=1e-6)
        np.testing.assert_allclose(answer.data[1].embedding, unit([n]), rtol=1e-6)


def test_a_failed_step_fails_its_request_alone(open_model: OpenModel) -> None:
    model, runner = open_model()
    runner.error = RuntimeError("no such kernel")
    with pytest.raises(StepFailed, match="no such kernel"):
        ask(model, input="hello")
    assert len(ask(model, input="hello").data) == 1


class Gate:
    """Holds the runner in its first step until it is opened."""

    def __init__(self, runner: FakeEncodingRunner) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        encode = runner.encode

        def wait(step: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(10)
            return encode(step)

        runner.encode = wait  # type: ignore[method-assign]


def test_too_many_at_once_are_turned_away(open_model: OpenModel) -> None:
    model, runner = open_model(max_queued_requests=1)
    gate = Gate(runner)

    async def ask_two() -> int:
        request = EmbeddingRequest(input=[1])
        first = asyncio.ensure_future(embed(model, request))
        await asyncio.to_thread(gate.entered.wait, 10)
        with pytest.raises(QueueFull):
            await embed(model, request)
        gate.opened.set()
        await first
        return len((await embed(model, request)).data)

    assert asyncio.run(ask_two()) == 1


def test_a_cancelled_request_stops_before_its_next_step(open_model: OpenModel) -> None:
    model, runner = open_model()
    gate = Gate(runner)

    async def cancel() -> None:
        task = asyncio.ensure_future(embed(model, EmbeddingRequest(input=[1] * 64)))
        await asyncio.to_thread(gate.entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        await embed(model, EmbeddingRequest(input=[2]))

    asyncio.run(cancel())
    assert runner.step_sizes == [8, 1]


def test_closing_ends_work_under_way(open_model: OpenModel) -> None:
    model, runner = open_model()
    gate = Gate(runner)

    async def close() -> None:
        task = asyncio.ensure_future(embed(model, EmbeddingRequest(input=[1] * 64)))
        await asyncio.to_thread(gate.entered.wait, 10)
        closing = asyncio.ensure_future(asyncio.to_thread(model.close))
        await asyncio.sleep(0.01)
        gate.opened.set()
        await closing
        with pytest.raises(EngineStopped):
            await task

    asyncio.run(close())
    assert runner.is_closed and runner.step_sizes == [8]
    with pytest.raises(EngineStopped):
        ask(model, input="hello")
    model.close()
