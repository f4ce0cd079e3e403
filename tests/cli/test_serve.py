"""The `serve` command: options that are refused, and where the others go."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mlc_llm.artifact
import mlc_llm.engine.embedding
import mlc_llm.engine.open
import mlc_llm.engine.worker
import mlc_llm.prepare.jit
import mlc_llm.prepare.resolve
import mlc_llm.serve.app
import mlc_llm.serve.model
import mlc_llm.serve.server
from mlc_llm.cli.main import main
from mlc_llm.errors import ModelNotFound


class Program:
    """Runs `mlc_llm serve` with models and the server itself replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.calls: dict[str, Any] = {}
        self.closed: list[str] = []
        self.has_drained = True
        self._artifacts = tmp_path
        monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path / "home"))
        for name in ("MLC_JIT_POLICY", "MLC_DOWNLOAD_CACHE_POLICY", "MLC_LLM_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(mlc_llm.prepare.resolve, "prepare_artifact", self._prepare_artifact)
        monkeypatch.setattr(mlc_llm.prepare.jit, "prepare_library", self._prepare_library)
        monkeypatch.setattr(mlc_llm.artifact, "read_chat_config", self._read_config)
        monkeypatch.setattr(mlc_llm.engine.open, "open_model", self._open_model)
        monkeypatch.setattr(mlc_llm.engine.embedding, "open_embedding_model", self._open_embedding)
        monkeypatch.setattr(mlc_llm.engine.worker, "EngineWorker", self._make_worker)
        monkeypatch.setattr(mlc_llm.serve.model.ServedModel, "of", self._serve_model)
        monkeypatch.setattr(mlc_llm.serve.app, "create_app", self._create_app)
        monkeypatch.setattr(mlc_llm.serve.server, "serve", self._serve)

    def run(self, *arguments: str) -> int:
        return main(["serve", *arguments])

    def _prepare_artifact(self, model: str | None, **options: Any) -> Path:
        self.calls.setdefault("artifacts", []).append((model, options["quantization"]))
        if model == "missing":
            raise ModelNotFound("missing does not exist")
        return Path(str(model))

    def _prepare_library(self, artifact: Path, **options: Any) -> Path:
        self.calls.setdefault("libraries", {})[str(artifact)] = options
        return Path("library")

    def _read_config(self, artifact: Path) -> Any:
        return SimpleNamespace(
            model_type="bert" if artifact.name == "bert" else "llama",
            model_task="chat",
            context_window_size=2048,
            prefill_chunk_size=2048,
            model_config={"max_batch_size": 80},
        )

    def _open_model(self, artifact: Path, library: Path, config: Any, **options: Any) -> Any:
        self.calls["open"] = {"artifact": artifact, "library": library, "config": config, **options}
        return SimpleNamespace(
            engine=SimpleNamespace(grammars=SimpleNamespace(start=self._start_grammars)),
            plan="the memory plan",
            close=lambda: self.closed.append("model"),
        )

    def _start_grammars(self) -> None:
        self.calls["grammars"] = "started"

    def _open_embedding(self, artifact: Path, library: Path, **options: Any) -> Any:
        self.calls["embedding"] = {"artifact": artifact, "library": library, **options}
        return SimpleNamespace(close=lambda: self.closed.append("embedding"))

    def _make_worker(self, engine: Any, **options: Any) -> Any:
        self.calls["worker"] = options
        return SimpleNamespace(is_stuck=False)

    def _serve_model(self, name: str, opened: Any, worker: Any) -> Any:
        self.calls["name"] = name
        return SimpleNamespace(name=name)

    def _create_app(self, models: Any, options: Any, traffic: Any) -> Any:
        self.calls["models"], self.calls["options"] = models, options
        return "app"

    def _serve(self, app: Any, workers: Any, traffic: Any, sockets: Any, **options: Any) -> bool:
        self.calls["serve"] = {"sockets": sockets, **options}
        options["announce"]()
        return self.has_drained


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return Program(monkeypatch, tmp_path)


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_it_says_where_it_listens(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run("model", "--port", "0") == 0
    captured = capsys.readouterr()
    address, _, port = captured.out.strip().rpartition(":")
    assert address == "Listening on http://127.0.0.1"
    assert 1024 <= int(port) <= 65535
    assert "the memory plan" in captured.err
    assert program.calls["name"] == "model"
    assert program.closed == ["model"]


def test_no_model_is_the_demo(program: Program) -> None:
    assert program.run("--port", "0") == 0
    assert program.calls["artifacts"] == [(None, None)]
    assert program.calls["name"] == "demo"


def test_options_reach_their_places(program: Program) -> None:
    code = program.run(
        *"model --port 0 --mode server --quantization q4f16_1 --opt O1 --model-id mine".split(),
        *"--max-queued-requests 7 --request-timeout 9 --drain-timeout 3".split(),
        *"--prefix-cache-mode disable --prefill-mode chunked --enable-debug".split(),
        *"--tool-parser llama --reasoning-parser none".split(),
        *["--overrides", "max_num_sequence=100;context_window_size=99;gpu_memory_utilization=0.5"],
        *["--allow-origins", '["http://a.example"]', "--allow-methods", '["POST"]'],
        *["--allow-headers", '["x-a"]', "--allow-credentials", "--api-key", "sk-1"],
    )
    assert code == 0
    assert program.calls["artifacts"] == [("model", "q4f16_1")]
    library = program.calls["libraries"]["model"]
    assert (library["device"], library["opt"]) == ("auto", "O1")
    # What the model bears anyway is not compiled for.
    assert library["overrides"] == {"max_batch_size": 100}
    assert program.calls["open"]["overrides"] == {"max_batch_size": 100}
    config = program.calls["open"]["config"]
    assert (config.mode, config.max_num_sequence) == ("server", 100)
    assert (config.max_single_sequence_length, config.gpu_memory_utilization) == (99, 0.5)
    assert (config.prefix_cache_mode, config.prefill_mode) == ("disable", "chunked")
    assert (config.tool_parser, config.reasoning_parser) == ("llama", "none")
    assert program.calls["grammars"] == "started"
    assert program.calls["worker"] == {"max_queued_requests": 7, "request_timeout_s": 9}
    assert program.calls["serve"]["drain_timeout_s"] == 3
    assert program.calls["name"] == "mine"
    options = program.calls["options"]
    assert (options.api_key, options.enable_debug) == ("sk-1", True)
    assert options.allow_origins == ("http://a.example",)
    assert (options.allow_methods, options.allow_headers) == (("POST",), ("x-a",))
    assert options.allow_credentials


def test_nothing_is_open_to_pages_and_other_hosts(program: Program) -> None:
    assert program.run("model", "--port", "0") == 0
    options = program.calls["options"]
    assert options.allow_origins == ()
    assert not options.allow_credentials
    assert set(options.allow_hosts) == {"localhost", "127.0.0.1", "[::1]"}


def test_hosts_can_be_added(program: Program) -> None:
    assert program.run("model", "--port", "0", "--allow-hosts", '["box.local"]') == 0
    assert {"box.local", "localhost"} <= set(program.calls["options"].allow_hosts)


def test_a_server_for_the_network_warns_without_a_key(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run("model", "--port", "0", "--host", "0.0.0.0") == 0
    assert program.calls["options"].allow_hosts is None
    assert "warning: " in capsys.readouterr().err
    assert program.run("model", "--port", "0", "--host", "0.0.0.0", "--api-key", "k") == 0
    assert "warning: " not in capsys.readouterr().err


def test_the_key_may_come_from_the_environment(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLC_LLM_API_KEY", "from-environment")
    assert program.run("model", "--port", "0") == 0
    assert program.calls["options"].api_key == "from-environment"
    assert program.run("model", "--port", "0", "--api-key", "given") == 0
    assert program.calls["options"].api_key == "given"


def test_no_limit_of_time(program: Program) -> None:
    assert program.run("model", "--port", "0", "--request-timeout", "0") == 0
    assert program.calls["worker"]["request_timeout_s"] is None


def test_a_model_for_embeddings_is_served_alone(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run("bert", "--port", "0", "--model-id", "vectors") == 0
    assert program.calls["libraries"]["bert"]["overrides"] == {"model_task": "embedding"}
    assert program.calls["embedding"]["name"] == "vectors"
    assert program.calls["models"].chat is None
    assert "open" not in program.calls and "worker" not in program.calls
    assert program.closed == ["embedding"]
    assert program.run("bert", "--port", "0", "--embedding-model", "other") == 2
    assert "bert is a model for embeddings itself" in capsys.readouterr().err
    assert program.run("bert", "--port", "0", "--model-task", "rerank") == 2
    assert "model_task is 'rerank', but bert is a model for" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["auto", "rerank"])
def test_the_task_reaches_the_engine(program: Program, task: str) -> None:
    assert program.run("model", "--port", "0", "--model-task", task) == 0
    assert program.calls["open"]["config"].model_task == task


def test_an_embedding_model_is_opened_beside(program: Program) -> None:
    assert program.run("model", "--port", "0", "--embedding-model", "vectors") == 0
    assert program.calls["artifacts"] == [("model", None), ("vectors", None)]
    assert program.calls["libraries"]["vectors"]["overrides"] == {"model_task": "embedding"}
    assert program.calls["embedding"]["name"] == "vectors"
    assert program.calls["models"].embedding is not None
    assert program.closed == ["model", "embedding"]


def test_finished_libraries_are_not_compiled(program: Program, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.touch()
    assert program.run("model", "--port", "0", "--model-lib", str(library)) == 0
    assert "libraries" not in program.calls
    assert program.calls["open"]["library"] == library


def test_an_early_end_is_told(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    program.has_drained = False
    assert program.run("model", "--port", "0") == 1
    assert "before all its requests were finished" in capsys.readouterr().err
    assert program.closed == ["model"]


def test_a_missing_model(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run("missing", "--port", "0") == 1
    assert "missing does not exist" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_is_made(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    with taken_port() as port:
        assert program.run("model", "--port", str(port)) == 2
    assert f"--port {port} is in use" in capsys.readouterr().err
    assert "artifacts" not in program.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--enable-tracing"], "--enable-tracing is not supported"),
        (["--additional-models", "draft"], "additional_models"),
        (["--speculative-mode", "eagle"], "speculation is not supported"),
        (["--speculative-mode", "nonsense"], "speculative_mode must be one of"),
        (["--mode", "fast"], "mode must be one of local, interactive, server"),
        (["--prefix-cache-mode", "x"], "prefix_cache_mode must be one of"),
        (["--prefill-mode", "x"], "prefill_mode must be one of"),
        (["--max-queued-requests", "-1"], "max_queued_requests must be"),
        (["--request-timeout", "-1"], "--request-timeout is -1"),
        (["--request-timeout", "nan"], "--request-timeout is nan"),
        (["--drain-timeout", "inf"], "--drain-timeout is inf"),
        (["--overrides", "nonsense=1"], "unknown key 'nonsense'"),
        (["--overrides", "tensor_parallel_shards=2"], "one device only"),
        (["--overrides", "spec_draft_length=2"], "speculation is not supported"),
        (["--overrides", "opt=O1", "--opt", "O2"], "use one"),
        (["--allow-origins", "*"], "--allow-origins '*' is not a JSON list"),
        (["--allow-hosts", "[1]"], "--allow-hosts"),
        (["--allow-credentials"], "--allow-credentials needs --allow-origins"),
        (["--allow-credentials", "--allow-origins", '["*"]'], "name the origins"),
        (["--api-key", ""], "API key"),
        (["--api-key", "two words "], "API key"),
        (["--model-id", " "], "--model-id is empty"),
        (["--tool-parser", "x"], "there is no tool parser 'x'; use auto or one of gpt_oss"),
        (["--model-task", "embedding"], "model_task must be one of auto, chat, rerank"),
        (["--reasoning-parser", "x"], "there is no reasoning parser 'x'; use one of auto, none"),
        (["--embedding-model-lib", "x.so"], "needs --embedding-model"),
        (["--port", "65536"], "--port 65536 is not a port"),
        (["--host", "no-such-host.invalid"], "has no address"),
        (["--device", "nonsense"], "nonsense"),
        (["--opt", "O9"], "O9"),
        (["--threads", "0"], "threads"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(
    program: Program,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert program.run("model", *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "artifacts" not in program.calls
    assert "serve" not in program.calls


@pytest.mark.parametrize("option", ["--model-lib", "--embedding-model-lib"])
def test_missing_libraries_are_named(
    program: Program, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert program.run("model", option, "nowhere.so", "--embedding-model", "vectors") == 1
    assert f"{option} nowhere.so does not exist" in capsys.readouterr().err


def test_lists_are_json(program: Program) -> None:
    origins = ["http://a.example", "http://b.example:3000"]
    assert program.run("model", "--port", "0", "--allow-origins", json.dumps(origins)) == 0
    assert program.calls["options"].allow_origins == tuple(origins)
