"""`MLCEngine` on a fake model: the same as `AsyncMLCEngine`, by waiting."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_engine import Parts, make_parts

from mlc_llm.api import AsyncMLCEngine, MLCEngine, Stream
from mlc_llm.errors import EngineStopped, RequestError

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_idle(parts: Parts) -> bool:
    worker = parts.models.chat.worker
    return worker.num_requests == 0 and worker.metrics.read_load().num_used_pages == 0


def answer_of(engine: MLCEngine, **fields: Any) -> str:
    answer = engine.chat.completions.create(messages=HELLO, **{"max_tokens": 12, **fields})
    text = answer.choices[0].message.content
    assert isinstance(text, str)
    return text


def text_of(stream: Stream[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_every_method(engine: MLCEngine) -> None:
    text = answer_of(engine)
    assert len(text) == 12
    stream = engine.chat.completions.create(messages=HELLO, max_tokens=12, stream=True)
    assert text_of(stream) == text
    assert engine.completions.create(prompt="he", max_tokens=3).choices[0].text
    assert len(engine.embeddings.create(input="hello").data) == 1
    order = engine.rerank.create(query="he", documents=["lo", "he"], return_documents=True)
    assert [result.document.text for result in order.results] == ["he", "lo"]
    assert [model.id for model in engine.models.list().data] == ["tiny", "vectors"]
    assert engine.models.retrieve("vectors").id == "vectors"
    assert engine.metrics()["completion_tokens_sum"] == 27
    engine.reset()
    engine.abort("nobody's")


def test_it_says_what_the_asynchronous_engine_says(parts: Parts) -> None:
    async def ask() -> str | None:
        engine = AsyncMLCEngine.from_models(parts.models, parts.close)
        answer = await engine.chat.completions.create(messages=HELLO, max_tokens=12)
        return answer.choices[0].message.content

    expected = asyncio.run(ask())
    other = make_parts()
    with MLCEngine.from_models(other.models, other.close) as engine:
        assert answer_of(engine) == expected


def test_errors_are_raised_where_they_are_made(engine: MLCEngine) -> None:
    with pytest.raises(RequestError, match="temprature"):
        answer_of(engine, temprature=1)
    with pytest.raises(RequestError):
        engine.embeddings.create(input="")


def test_without_an_embedding_model() -> None:
    parts = make_parts(has_embedding=False)
    with MLCEngine.from_models(parts.models, parts.close) as engine:
        with pytest.raises(RequestError, match="embedding"):
            engine.embeddings.create(input="hello")
        with pytest.raises(RequestError, match="puts documents in order"):
            engine.rerank.create(query="he", documents=["he"])
        assert len(engine.models.list().data) == 1


@pytest.mark.parametrize("way", ["break", "close", "block", "drop"])
def test_leaving_a_stream_aborts_it(engine: MLCEngine, parts: Parts, way: str) -> None:
    stream = engine.chat.completions.create(messages=HELLO, stream=True)
    if way == "break":
        for _ in stream:
            break
        del stream
    elif way == "close":
        next(stream)
        stream.close()
    elif way == "block":
        with stream:
            next(stream)
    else:
        del stream
    gc.collect()
    wait_for(lambda: is_idle(parts))
    assert len(parts.runner.steps) < 200
    assert len(answer_of(engine)) == 12


def test_many_threads_at_once(engine: MLCEngine) -> None:
    alone = [answer_of(engine, seed=seed, max_tokens=5 + seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(answer_of, engine, seed=seed, max_tokens=5 + seed) for seed in range(8)
        ]
        assert [each.result() for each in asked] == alone


def test_inside_a_running_loop(engine: MLCEngine) -> None:
    """As in a notebook."""

    async def cell() -> str:
        return answer_of(engine)

    assert asyncio.run(cell()) == answer_of(engine)


def test_ctrl_c_aborts_the_request(engine: MLCEngine, parts: Parts) -> None:
    parts.runner.gate.clear()

    def interrupt() -> None:
        parts.runner.is_in_step.wait(5)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    # A shell lets its jobs in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            answer_of(engine, max_tokens=200)
        helper.join()
    finally:
        signal.signal(signal.SIGINT, before)
    parts.runner.gate.set()
    wait_for(lambda: is_idle(parts))
    assert len(parts.runner.steps) < 100
    assert len(answer_of(engine)) == 12


def test_terminate_ends_what_other_threads_wait_for(parts: Parts) -> None:
    engine = MLCEngine.from_models(parts.models, parts.close)
    parts.runner.gate.clear()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(answer_of, engine)
        assert parts.runner.is_in_step.wait(5)
        engine.terminate()
        with pytest.raises(EngineStopped):
            waiting.result(5)
    engine.terminate()
    with pytest.raises(EngineStopped, match="terminated"):
        answer_of(engine)
    assert parts.closings == ["closed"]


def test_a_stream_after_terminate(parts: Parts) -> None:
    engine = MLCEngine.from_models(parts.models, parts.close)
    stream = engine.chat.completions.create(messages=HELLO, stream=True)
    next(stream)
    parts.runner.gate.clear()
    engine.terminate()
    with pytest.raises(EngineStopped):
        text_of(stream)
    stream.close()


def bridges() -> set[threading.Thread]:
    """Return the threads of synchronous engines."""
    return {thread for thread in threading.enumerate() if thread.name == "mlc_llm sync"}


def test_the_last_reference_ends_the_engine(parts: Parts) -> None:
    others = bridges()  # of engines that other tests have not let go of yet
    engine = MLCEngine.from_models(parts.models, parts.close)
    assert len(answer_of(engine)) == 12
    (thread,) = bridges() - others
    del engine
    wait_for(lambda: parts.closings == ["closed"])
    wait_for(lambda: not thread.is_alive())


def test_a_stream_of_an_engine_without_a_name(parts: Parts) -> None:
    stream = MLCEngine.from_models(parts.models, parts.close).chat.completions.create(
        messages=HELLO, max_tokens=9, stream=True
    )
    gc.collect()
    assert len(text_of(stream)) == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_it_says_what_to_do(engine: MLCEngine) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = "no error"
        try:
            answer_of(engine)
        except EngineStopped as error:
            message = str(error)
        finally:
            engine.terminate()
            os.write(writer, message.encode())
            os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 1000).decode()
    os.close(reader), os.close(writer)
    assert "fork" in told
    assert len(answer_of(engine)) == 12
