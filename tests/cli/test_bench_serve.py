"""The `bench serve` command: on a small server of the tests, and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.fake_openai import FakeOpenAI

import mlc_llm.serve.popen_server
from mlc_llm.cli.main import main

FEW = ["--requests", "2", "--warmup", "0", "--prompt-len", "30", "--output-len", "3"]


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI() as fake:
        assert main(["bench", "serve", fake.url, *FEW, "--concurrency", "1,2"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"{fake.url}, chat"
    for words in ("output tokens/s", "1 client ", "2 clients", "first token", "p99"):
        assert any(words in line for line in lines), words
    assert captured.err.splitlines() == ["measuring 1 client ...", "measuring 2 clients ..."]


def test_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    with FakeOpenAI() as fake:
        options = ["--concurrency", "2", "--endpoint", "completions", "--json", str(path)]
        assert main(["bench", "serve", fake.url, *FEW, *options]) == 0
    report = json.loads(path.read_text())
    assert report["questions"]["lengths"] == {"prompt_len": 30, "output_len": 3, "spread": 0.0}
    [load] = report["loads"]
    assert (load["clients"], load["rate"], load["answered"]) == (2, None, 2)
    assert (load["prompt_tokens"], load["output_tokens"]) == (60, 6)
    assert 0 < load["ttft_s"]["p50"] <= load["latency_s"]["p99"] < 5


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.png"
    with FakeOpenAI() as fake:
        assert main(["bench", "serve", fake.url, *FEW, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_arrivals_and_dialogues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dialogues.json"
    dialogue = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]
    path.write_text(json.dumps([{"conversations": dialogue}]))
    with FakeOpenAI(tokenize="prompt") as fake:
        options = ["--dataset", str(path), "--rate", "50,90", "--requests", "3", "--model", "x"]
        assert main(["bench", "serve", fake.url, *options]) == 0
    assert "90 requests/s" in capsys.readouterr().out
    assert {(b["model"], b["max_tokens"]) for b in fake.bodies[1:]} == {("x", 1)}


def test_the_key_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOpenAI(api_key="sesame") as fake:
        command = ["bench", "serve", fake.url, *FEW, "--concurrency", "1"]
        assert main(command) == 1
        assert "HTTP 401: wrong key" in capsys.readouterr().err
        assert main([*command, "--api-key", "sesame"]) == 0
        monkeypatch.setenv("MLC_LLM_API_KEY", "sesame")
        assert main(command) == 0


class FakePopenServer:
    """Stands for `mlc_llm serve` in a child process."""

    made: dict[str, Any]
    is_running = False

    def __init__(self, model: str, **options: Any) -> None:
        type(self).made = {"model": model, **options}
        self._server = FakeOpenAI()
        self.base_url = self._server.url

    def __enter__(self) -> FakePopenServer:
        self._server.__enter__()
        type(self).is_running = True
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()
        type(self).is_running = False


def test_a_model_is_served_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlc_llm.serve.popen_server, "PopenServer", FakePopenServer)
    options = ["--server-args", "--overrides 'max_num_sequence=2'", "--concurrency", "1"]
    assert main(["bench", "serve", "some/model", *FEW, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("some/model, chat")
    assert "starting `mlc_llm serve some/model`" in captured.err
    made = FakePopenServer.made
    assert (made["model"], made["mode"]) == ("some/model", "server")
    assert made["arguments"] == ["--overrides", "max_num_sequence=2"]
    assert not FakePopenServer.is_running


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--concurrency 0", "--concurrency is 0; it must be at least 1"),
        ("--concurrency 1,x", "--concurrency '1,x' is not a list"),
        ("--concurrency 5000", "more than 1024 clients"),
        ("--concurrency 1 --rate 1", "--concurrency and --rate are two kinds of load"),
        ("--rate x", "--rate 'x' is not a list of numbers"),
        ("--rate 0", "--rate is 0; it must be a number above 0"),
        ("--rate inf", "--rate is inf"),
        ("--requests 0", "--requests is 0"),
        ("--duration nan", "--duration is nan"),
        ("--warmup -1", "--warmup is -1"),
        ("--prompt-len 0", "--prompt-len is 0"),
        ("--output-len 0", "--output-len is 0"),
        ("--spread 2", "--spread is 2; it must be from 0 to 1"),
        ("--seed -1", "--seed is -1"),
        ("--timeout 0", "--timeout is 0"),
        ("--temperature -1", "--temperature is -1"),
        ("--endpoint embeddings", "choose chat or completions"),
        ("--max-total-len 5", "--max-total-len chooses dialogues"),
        ("--dataset x --prompt-len 5", "--prompt-len is for made-up prompts"),
        ("--dataset x --spread 1", "--spread is for made-up prompts"),
        ("--dataset no/such.json", "--dataset no/such.json cannot be read"),
        ("--server-args x", "--server-args are for a model"),
        ("--json no/such/out.json", "there is no directory no/such"),
        ("--plot out.pdf", "only .png files"),
        ("--rquests 1", "No such option: --rquests"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    with FakeOpenAI() as fake:
        assert main(["bench", "serve", fake.url, *options.split()]) == 2
    assert words in capsys.readouterr().err
    assert not fake.bodies


def test_quotes_in_server_arguments_must_close(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "model", "--server-args", "'x"]) == 2
    assert "cannot be split" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["bench"], ["--debug", "bench"]])
def test_bench_and_bench_serve_are_two_commands(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "serve", "--help"]) == 0
    assert "Usage: mlc_llm bench serve [OPTIONS]" in capsys.readouterr().out
    assert main([*words, "--help"]) == 0
    assert "Usage: mlc_llm bench [OPTIONS]" in capsys.readouterr().out
