"""`/v1/rerank` by a reranker that answers yes or no: a small Qwen3, compiled on the fly, against
the plain NumPy model on the prompt of the model card.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_server import live_server
from reference_cases import REFERENCES
from safetensors.numpy import load_file, save_file
from second_opinion import forward
from small_tokenizers import CHATML_TOKENS, byte_level, write_tokenizer

from mlc_llm.engine.config import EngineConfig
from mlc_llm.engine.open import OpenModel, open_model
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.errors import OptionError, UnsupportedModel
from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.jit import prepare_library
from mlc_llm.prepare.progress import NullProgress
from mlc_llm.prepare.resolve import prepare_artifact
from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.options import AppOptions
from mlc_llm.text.tokenizer import Tokenizer

pytestmark = pytest.mark.cpu

PATH, NAME = "/v1/rerank", "ranker"
CONTEXT = 640
QUERY = "What is the capital of China?"
DOCUMENTS = ["The capital of China is Beijing.", "Gravity pulls.", "Größe ☃", "x" * 90]
DOCUMENTS.append(DOCUMENTS[1])
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# Of the model card's own code with transformers 5.23 and torch 2.13 in float32, on `write_source`.
STORED_SCORES = (0.867831, 0.883305, 0.859089, 0.785903)
PROMPT = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {instruction}
<Query>: {query}
<Document>: {document}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""


def write_source(directory: Path, *, modules: dict[str, Any] | None) -> Path:
    """Write a Qwen3 with random weights; modules: the settings of a LogitScore, if it has one."""
    origin = REFERENCES / "qwen3"
    special = (*CHATML_TOKENS, "<think>", "</think>", "no", "yes")
    tokenizer = byte_level(special)
    write_tokenizer(directory, tokenizer, eos_token="<|im_end|>")
    size = tokenizer.get_vocab_size()
    config = json.loads((origin / "config.json").read_text())
    config |= {"vocab_size": size, "max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(origin / "chat_template.jinja", directory)
    weights = load_file(origin / "model.safetensors")
    draw = np.random.default_rng(7)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            shape = (size, weights[name].shape[1])
            weights[name] = draw.normal(0, 0.3, shape).astype(np.float32)
    save_file(weights, directory / "model.safetensors")
    if modules is not None:
        kinds = [("Transformer", ""), ("LogitScore", "1_LogitScore")]
        (directory / "modules.json").write_text(
            json.dumps([{"type": f"sentence_transformers.{k}", "path": p} for k, p in kinds])
        )
        (directory / "1_LogitScore").mkdir()
        (directory / "1_LogitScore" / "config.json").write_text(json.dumps(modules))
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CacheHome:
    return CacheHome(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    return write_source(directory, modules={"true_token_id": 6, "false_token_id": 5})


def convert(source: Path, home: CacheHome) -> Path:
    return prepare_artifact(
        str(source),
        quantization="q0f32",
        home=home,
        download_policy=CachePolicy.ON,
        jit_policy=CachePolicy.ON,
        progress=NullProgress(),
    )


@pytest.fixture(scope="module")
def paths(source: Path, home: CacheHome) -> tuple[Path, Path]:
    artifact = convert(source, home)
    library = prepare_library(
        artifact,
        device="cpu",
        opt="O2;activations=float32",
        overrides={"prefill_chunk_size": 128},
        home=home,
        jit_policy=CachePolicy.ON,
        progress=NullProgress(),
    )
    return artifact, library


def open_as(paths: tuple[Path, Path], task: str = "auto") -> OpenModel:
    config = EngineConfig(
        mode="server", max_num_sequence=2, max_total_sequence_length=4096, model_task=task
    )
    return open_model(*paths, config)


@pytest.fixture(scope="module")
def client(paths: tuple[Path, Path]) -> Iterator[httpx.Client]:
    opened = open_as(paths)
    worker = EngineWorker(opened.engine)
    models = ServedModels(ServedModel.of(NAME, opened, worker))
    traffic = Traffic()
    with live_server(create_app(models, AppOptions(), traffic), [worker], traffic) as live:
        with httpx.Client(base_url=live.url, timeout=60) as client:
            yield client
    opened.engine.check_integrity()
    opened.close()


def expected_score(source: Path, **texts: str) -> tuple[float, int]:
    """Return the probability of yes by the published code's rule, and the prompt's tokens."""
    prompt = Tokenizer.load(source).encode(PROMPT.format(**texts))
    config = json.loads((source / "config.json").read_text())
    logits = forward(config, load_file(source / "model.safetensors"), prompt)[-1]
    yes, no = logits[6], logits[5]
    return float(np.exp(yes) / (np.exp(yes) + np.exp(no))), len(prompt)


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "query": QUERY, "documents": DOCUMENTS, **fields}
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("instruction", [None, "Find what is about stars"])
def test_scores_are_the_probability_of_yes(
    client: httpx.Client, source: Path, instruction: str | None
) -> None:
    fields = {} if instruction is None else {"instruction": instruction}
    answer = ask(client, **fields)
    found = {result["index"]: result["relevance_score"] for result in answer["results"]}
    total = 0
    for index, document in enumerate(DOCUMENTS):
        expected, num_tokens = expected_score(
            source, instruction=instruction or INSTRUCTION, query=QUERY, document=document
        )
        total += num_tokens
        if instruction is None:
            assert expected == pytest.approx((*STORED_SCORES, STORED_SCORES[1])[index], abs=2e-6)
        assert found[index] == pytest.approx(expected, abs=2e-5)
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    assert found[1] == found[4]  # equal texts, in their order
    places = list(found)
    assert places.index(1) + 1 == places.index(4)
    assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert (answer["object"], answer["model"]) == ("list", NAME)


def test_a_score_depends_on_no_other_document(client: httpx.Client) -> None:
    together = ask(client)["results"]
    for result in together:
        [alone] = ask(client, documents=[DOCUMENTS[result["index"]]])["results"]
        assert alone["relevance_score"] == result["relevance_score"]


def test_fewer_results_and_their_texts(client: httpx.Client) -> None:
    everything = ask(client)["results"]
    documents = [{"text": text} for text in DOCUMENTS]
    best = ask(client, model=None, documents=documents, top_n=2, return_documents=True)["results"]
    assert [result["index"] for result in best] == [result["index"] for result in everything[:2]]
    assert [result["document"]["text"] for result in best] == [
        DOCUMENTS[result["index"]] for result in best
    ]


def test_many_documents_are_asked_in_turns(client: httpx.Client) -> None:
    documents = [f"text {number % 7}" for number in range(40)]
    results = ask(client, documents=documents)["results"]
    score_of = {result["index"]: result["relevance_score"] for result in results}
    assert all(score_of[number] == score_of[number % 7] for number in range(40))


def test_long_documents_are_refused_or_cut(client: httpx.Client, source: Path) -> None:
    long = "xyz" * CONTEXT
    body = {"query": "a", "documents": ["a", long]}
    error = client.post(PATH, json=body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "documents[1]")
    assert ask(client, documents=[long], truncate_prompt_tokens=-1)["usage"]["total_tokens"] == (
        CONTEXT - 1
    )
    _, least = expected_score(source, instruction=INSTRUCTION, query=QUERY, document="xyz")
    [cut] = ask(client, documents=[long], truncate_prompt_tokens=least)["results"]
    [short] = ask(client, documents=["xyz"])["results"]
    assert cut["relevance_score"] == short["relevance_score"]
    fields = {"query": QUERY, "documents": [long], "truncate_prompt_tokens": least - 3}
    response = client.post(PATH, json=fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == "query"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"instruction": ""}, "instruction"),
        ({"instruction": 3}, "instruction"),
        ({"instruction": "x" * 5000}, "instruction"),
        ({"documents": []}, "documents"),
        ({"nonsense": 1}, "nonsense"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post(PATH, json={"query": "a", "documents": ["a"], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_it_chats_too_and_other_models_are_not_known(client: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    body = {"model": "other", "query": "a", "documents": ["a"]}
    assert client.post(PATH, json=body).status_code == 404


def test_a_model_ranks_where_its_files_or_the_option_say_so(
    paths: tuple[Path, Path], home: CacheHome, tmp_path: Path
) -> None:
    _, library = paths
    for task, ranks in (("auto", True), ("chat", False)):
        opened = open_as(paths, task)
        assert (opened.ranking is not None) == ranks
        opened.close()
    silent = convert(write_source(tmp_path, modules=None), home)
    for task, ranks in (("auto", False), ("rerank", True)):
        opened = open_as((silent, library), task)
        assert (opened.ranking is not None) == ranks
        opened.close()
    opened = open_as((silent, library))
    served = ServedModels(ServedModel.of(NAME, opened, EngineWorker(opened.engine)))
    with pytest.raises(Exception, match="--model-task rerank"):
        served.find_reranker(NAME)
    opened.close()
    with pytest.raises(OptionError, match="model_task"):
        EngineConfig(model_task="embedding")
    with pytest.raises(OptionError, match="leave it out"):
        EngineConfig(model_task="rerank").check_embeds("minilm")


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"true_token_id": 6, "false_token_id": None}, "choose between two tokens"),
        ({"true_token_id": 6, "false_token_id": 9}, "answers 'yes' and"),
    ],
)
def test_other_rerankers_are_refused(
    home: CacheHome, tmp_path: Path, modules: dict[str, Any], words: str
) -> None:
    source = write_source(tmp_path, modules=modules)
    with pytest.raises(UnsupportedModel, match=words):
        convert(source, home)


def test_a_request_that_is_left_ends_its_questions(paths: tuple[Path, Path]) -> None:
    from mlc_llm.serve.judging import judge

    opened = open_as(paths)
    worker = EngineWorker(opened.engine)
    worker.start()
    model = ServedModel.of(NAME, opened, worker)

    async def leave() -> None:
        asking = asyncio.create_task(judge(model, QUERY, DOCUMENTS * 50))
        while worker.num_requests == 0:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while worker.num_requests:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(leave(), 60))
    worker.stop()
    opened.engine.check_integrity()
    opened.close()
