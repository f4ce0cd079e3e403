"""The comparison of servers: its cases on a small server, its table, how servers are started."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench.fake_openai import FakeOpenAI

from mlc_llm.bench.load.ask import Record
from mlc_llm.bench.load.prompts import Lengths

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a script; their names are forgotten after the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def cases(load: Any) -> ModuleType:
    return load("serving_cases")  # type: ignore[no-any-return]


def test_a_load_is_measured(cases: ModuleType) -> None:
    with FakeOpenAI() as fake:
        result = cases.measure_load(fake.url, 2, Lengths(50, 4), 6, 0)
    assert result.num_answered == 6
    assert result.output_tokens_per_s == pytest.approx(24 / result.run.wall_s)
    assert {len(body["prompt"].split()) for body in fake.bodies[-6:]} == {50}


def test_a_request_that_fails_fails_the_load(cases: ModuleType) -> None:
    with FakeOpenAI(ending="data: {}\n\n") as fake:
        with pytest.raises(Exception, match="cannot be measured: connection lost"):
            cases.measure_load(fake.url, 1, Lengths(50, 4), 2, 0)


def test_time_outside_the_library_is_read_from_the_metrics(cases: ModuleType) -> None:
    with FakeOpenAI(seconds=(2.0, 0.5)) as fake:
        assert cases.outside_share(fake.url, 1, Lengths(16, 4), 2, 0) == pytest.approx(25)


def test_gaps_are_those_that_overlap_the_time(cases: ModuleType) -> None:
    record = Record(0.0, text_times=[1.0, 2.0, 3.0, 6.0, 7.0, 17.0])
    assert cases.longest_gap(record, 2.5, 2.9) == 1.0
    assert cases.longest_gap(record, 2.5, 3.1) == 3.0
    assert cases.longest_gap(record, 5.0, 20.0) == 10.0


def test_a_long_prompt_is_sent_among_streams(cases: ModuleType) -> None:
    with FakeOpenAI(event_delay_s=0.002, prefill_delay_s=0.0002) as fake:
        worst, first_s = cases.measure_stall(fake.url, 3, 1000, 300, 0)
    assert fake.most_running == 4
    assert 1 <= worst < 50
    assert 0.2 <= first_s < 1
    assert len(fake.bodies[-1]["prompt"].split()) == 1000


def test_streams_must_outlive_the_long_prompt(cases: ModuleType, load: Any) -> None:
    failed = load("engine").EngineFailed
    with FakeOpenAI(event_delay_s=0.002, prefill_delay_s=0.001) as fake:
        with pytest.raises(failed, match="make it longer"):
            cases.measure_stall(fake.url, 2, 500, 60, 0)
        with pytest.raises(failed, match="a stream ended at once"):
            cases.measure_stall(fake.url, 2, 500, 5, 0)


def test_a_second_turn_repeats_the_first(cases: ModuleType) -> None:
    with FakeOpenAI(prefill_delay_s=0.0005) as fake:
        first_s = cases.measure_second_turn(fake.url, 200, 1, 0)
    first, second = fake.bodies[-2:]
    assert second["messages"][0] == first["messages"][0]
    assert second["messages"][1] == {"role": "assistant", "content": "a " * 16}
    assert len(second["messages"]) == 3
    assert first_s < 0.09


class FakeEngine:
    """Stands for an engine whose server is a `FakeOpenAI`."""

    def __init__(self, name: str, delay_s: float, is_broken: bool = False) -> None:
        self.name = name
        self.delay_s = delay_s
        self.is_broken = is_broken

    def version(self) -> str:
        return f"{self.name} 1.0"


FEW = [
    *("--shape", "smollm2_135m", "--rounds", "1", "--requests", "1", "--clients", "1,2"),
    *("--prompt-len", "20", "--output-len", "20", "--streams", "2", "--stream-len", "60"),
    *("--long-prompt-len", "100", "--chat-len", "200"),
]


@pytest.fixture
def serving(load: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with two engines that need no processes."""
    script: ModuleType = load("serving")
    failed = load("engine").EngineFailed

    @contextmanager
    def running(engine: FakeEngine, shape: Any, wanted: Any, **_: Any) -> Iterator[str]:
        if engine.is_broken:
            raise failed("it does not start")
        prefill_delay_s = 0.0 if wanted.has_prefix_cache else 0.0002
        with FakeOpenAI(
            event_delay_s=engine.delay_s, prefill_delay_s=prefill_delay_s, seconds=(1.0, 0.1)
        ) as fake:
            yield fake.url

    engines = {
        "mlc_llm": lambda home: FakeEngine("mlc_llm", 0.001),
        "llama.cpp": lambda home: FakeEngine("llama.cpp", 0.003),
    }
    monkeypatch.setattr(script, "ENGINES", engines)
    monkeypatch.setattr(script, "running_server", running)
    monkeypatch.setattr(script, "prepare", lambda engines, shape: {})
    return script


def test_a_comparison_prints_ratios_and_writes_figures(
    serving: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert serving.main([*FEW, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| smollm2_135m | mlc_llm | llama.cpp | ratio |" in lines
    split = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
    rows = {cells[0].strip(): cells[1:] for cells in split}
    for title in (
        "output, 1 clients (tok/s)",
        "each later token, 2 clients (s)",
        "100-token prompt among 2 streams: longest gap over median (x)",
        "second turn after 200 tokens: first token, no prefix cache (s)",
    ):
        assert title in rows
    assert float(rows["each later token, 1 clients (s)"][2].split(" x")[0]) > 1.5
    outside = rows["step outside the library, 1 clients (%)"]
    assert outside[0].startswith("10 (") and outside[1] == ""
    report = json.loads(path.read_text())
    assert report["plan"]["rounds"] == 1
    for figures in report["smollm2_135m"]:
        assert {len(rounds) for rounds in figures["rounds"].values()} == {1}


def test_an_engine_that_fails_is_named(
    serving: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {**serving.ENGINES, "llama.cpp": lambda home: FakeEngine("llama.cpp", 0, True)}
    monkeypatch.setattr(serving, "ENGINES", broken)
    assert serving.main([*FEW, "--case", "load"]) == 1
    captured = capsys.readouterr()
    assert "FAILED llama.cpp, smollm2_135m, load: it does not start" in captured.err
    assert "| output, 2 clients (tok/s) |" in captured.out


@pytest.mark.parametrize(
    "options", [["--rounds", "0"], ["--clients", "x"], ["--clients", "0"], ["--case", "x"]]
)
def test_wrong_options_end_the_script(serving: ModuleType, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serving.main(options)
    assert caught.value.code == 2


class Command:
    """Stands for an engine that is served by a line of Python."""

    def __init__(self, engine: ModuleType, code: str) -> None:
        self._engine = engine
        self._code = code

    def server(self, shape: Any, serving: Any, port: int) -> Any:
        words = [sys.executable, "-c", self._code, str(port)]
        return self._engine.ServerCommand(words, {"GREETING": "hello"})


HEALTHY = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/health" and os.environ["GREETING"] == "hello"
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_started_and_ended(load: Any) -> None:
    engine = load("engine")
    wanted = engine.Serving(2, 1, 100)
    with engine.running_server(Command(engine, HEALTHY), None, wanted) as url:
        assert engine._is_healthy(url)
    assert not engine._is_healthy(url)


def test_a_server_that_ends_tells_why(load: Any) -> None:
    engine = load("engine")
    command = Command(engine, "raise SystemExit('no model')")
    with pytest.raises(engine.EngineFailed, match="does not serve:\nno model"):
        with engine.running_server(command, None, engine.Serving(2, 1, 100)):
            pass


def test_commands_name_threads_sequences_and_context(load: Any) -> None:
    engine = load("engine")
    shape = engine.Shape.load("smollm2_135m", Path("/home"))
    wanted = engine.Serving(threads=2, sequences=4, context=100, has_prefix_cache=False)
    rival = load("rivals.llama_cpp_q4_0").LlamaCpp(Path("/home")).server(shape, wanted, 80)
    text = " ".join(rival.words)
    assert "-t 2 -np 4 -c 400 --no-cache-prompt --host 127.0.0.1 --port 80" in text
    ours = load("rivals.ours").MlcLlm(Path("/home")).server(shape, wanted, 80)
    text = " ".join(ours.words)
    assert "max_num_sequence=4" in text and "--prefix-cache-mode disable" in text
    assert ours.environment["TVM_NUM_THREADS"] == "2"
