"""A served model on a fake runner whose steps can be slowed, held and made to fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fakes import FakeRunner, Logits, next_token, only
from live_server import LiveServer, live_server
from small_tokenizers import byte_level

from mlc_llm.artifact import ChatConfig
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.grammar_cache import GrammarCache
from mlc_llm.engine.worker import EngineWorker
from mlc_llm.runtime.runner import Step
from mlc_llm.serve.app import create_app
from mlc_llm.serve.catalog import ServedModels
from mlc_llm.serve.gate import Traffic
from mlc_llm.serve.model import ServedModel
from mlc_llm.serve.options import AppOptions
from mlc_llm.serve.server import bind, serve, url_of
from mlc_llm.text.conversation import Conversation
from mlc_llm.text.grammars.vocabulary import GrammarVocabulary
from mlc_llm.text.prompt import PromptBuilder
from mlc_llm.text.tokenizer import Tokenizer

MODEL = "fake"
JSON = {"content-type": "application/json"}
# What no answer may show of the machine.
INTERNALS = ("Traceback", "/work", "/usr", "site-packages", ".py", "0x7")
TOKENIZER = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})
VOCAB_SIZE = TOKENIZER.vocab_size
LETTERS = [TOKENIZER.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz"]


def letter_after(tokens: list[int]) -> Logits:
    """Return logits by which one letter follows, a pure function of the tokens."""
    return only(LETTERS[next_token(tokens) % len(LETTERS)], VOCAB_SIZE)


class SlowRunner(FakeRunner):
    """A fake runner whose steps take a while, or wait to be let go."""

    def __init__(self, step_s: float = 0.0, **options: Any) -> None:
        super().__init__(letter_after, vocab_size=VOCAB_SIZE, **options)
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.is_in_step = threading.Event()
        # Called with each step before it runs; may raise.
        self.before_step: Callable[[Step], None] = lambda step: None

    def forward(self, step: Step) -> Logits:
        self.is_in_step.set()
        self.gate.wait(30)
        time.sleep(self.step_s)
        self.before_step(step)
        return super().forward(step)


@dataclass
class Served:
    """A running server and what is behind it."""

    live: LiveServer
    runner: SlowRunner
    worker: EngineWorker
    client: httpx.Client

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def num_used_pages(self) -> float:
        """Return the gauge of used pages, as a client sees it."""
        return self.metric("kv_cache_usage_perc") * self.runner.num_pages

    def metric(self, name: str, **labels: str) -> float:
        """Return one value of /metrics; 0 where there is none yet."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"mlc_llm_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        """Wait until no sequence holds pages and none waits; fail after a while."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            is_idle = self.num_used_pages == 0 and self.metric("num_requests_waiting") == 0
            if is_idle and self.worker.num_requests == 0:
                return
            time.sleep(0.01)
        raise AssertionError("sequences still hold pages or wait")

    def answer(self, text: str = "hello", max_tokens: int = 8, **fields: Any) -> httpx.Response:
        """Ask for a completion."""
        body = {"model": MODEL, "prompt": text, "max_tokens": max_tokens, **fields}
        return self.client.post("/v1/completions", json=body)

    def assert_works(self) -> None:
        """Ask for a short answer and check it: the server is unharmed."""
        response = self.answer(max_tokens=4)
        assert response.status_code == 200, response.text
        assert len(response.json()["choices"][0]["text"]) == 4


def model_on(
    runner: FakeRunner,
    tokenizer: Tokenizer,
    prompts: PromptBuilder,
    *,
    name: str = MODEL,
    temperature: float = 1.0,
    **worker_options: Any,
) -> ServedModel:
    """Return a model on a runner, its worker not yet started."""
    size, metadata = tokenizer.vocab_size, runner.metadata
    grammars = GrammarCache(lambda: GrammarVocabulary(tokenizer, prompts.stop_token_ids, size))
    engine = Engine(runner, active_vocab_size=size, grammars=grammars)
    config = ChatConfig(
        model_type=metadata.model_type,
        quantization=metadata.quantization,
        model_config={},
        vocab_size=size,
        context_window_size=metadata.context_window_size,
        prefill_chunk_size=metadata.prefill_chunk_size,
        conv_template={},
        temperature=temperature,
    )
    worker = EngineWorker(engine, **worker_options)
    return ServedModel(
        name, config, tokenizer, prompts, worker, engine.vocab_size, engine.max_sequence_len
    )


def prompt_builder() -> PromptBuilder:
    eos = TOKENIZER.token_to_id("<|im_end|>")
    assert eos is not None
    return PromptBuilder(TOKENIZER, Conversation(), None, [eos], VOCAB_SIZE)


def make_model(
    runner: SlowRunner, prompts: PromptBuilder | None = None, **worker_options: Any
) -> ServedModel:
    """Return a model of letters, its worker not yet started."""
    return model_on(runner, TOKENIZER, prompts or prompt_builder(), **worker_options)


@contextmanager
def served(
    *,
    step_s: float = 0.0,
    context: int = 512,
    num_pages: int = 256,
    batch: int = 8,
    options: AppOptions | None = None,
    drain_timeout_s: float = 5.0,
    prompts: PromptBuilder | None = None,
    **worker_options: Any,
) -> Iterator[Served]:
    """Serve a fake model over HTTP; leaving checks that the engine gave everything back."""
    runner = make_runner(step_s, context, num_pages, batch)
    model = make_model(runner, prompts, **worker_options)
    traffic = Traffic()
    app = create_app(ServedModels(model), options or AppOptions(), traffic)
    with live_server(app, [model.worker], traffic, drain_timeout_s) as live:
        no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        with httpx.Client(base_url=live.url, limits=no_limits, timeout=30) as client:
            yield Served(live, runner, model.worker, client)
        runner.gate.set()
    model.worker.engine.check_integrity()
    model.worker.engine.close()


@contextmanager
def served_and_checked() -> Iterator[Served]:
    """Serve a fake model; leaving checks that it is idle and unharmed."""
    with served() as running:
        yield running
        running.wait_until_idle()
        running.assert_works()


def post(server: Served, path: str, body: Any) -> httpx.Response:
    """Send bytes or text as they are, other bodies as JSON."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return server.client.post(path, content=content, headers=JSON, timeout=20)


def make_runner(
    step_s: float = 0.0, context: int = 512, num_pages: int = 256, batch: int = 8
) -> SlowRunner:
    return SlowRunner(
        step_s,
        num_pages=num_pages,
        context_window_size=context,
        prefill_chunk_size=64,
        max_batch_size=batch,
    )


def serve_forever(step_s: float, drain_timeout_s: float) -> int:
    """Serve until a signal and return the exit code; prints the address first."""
    model = make_model(make_runner(step_s))
    traffic = Traffic()
    sockets = bind("127.0.0.1", 0)
    has_drained = serve(
        create_app(ServedModels(model), AppOptions(), traffic),
        [model.worker],
        traffic,
        sockets,
        drain_timeout_s=drain_timeout_s,
        announce=lambda: print(url_of("127.0.0.1", sockets), flush=True),
    )
    return 0 if has_drained else 1
