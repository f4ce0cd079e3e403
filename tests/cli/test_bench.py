"""The `bench` command: its options on a fake model, and as a whole on a tiny real one."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from bench.fakes import FakeRunner

import mlc_llm.cli.bench
from mlc_llm.bench.bandwidth import BandwidthMeter
from mlc_llm.cli.bench_model import LoadedModel, Subject
from mlc_llm.cli.main import main
from mlc_llm.device import CPU

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 250,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


class FakeLoad:
    """Stands for everything between the options and the measurements."""

    def __init__(self) -> None:
        self.runner = FakeRunner()
        self.subject: Subject | None = None
        self.workloads: list[str] = []

    def __call__(self, subject: Subject, workloads: Any, progress: Any) -> LoadedModel:
        self.subject = subject
        self.workloads = [str(workload) for workload in workloads]
        return LoadedModel(self.runner, CPU, "q4f16_1", 3, 1_000_000, 0.5, None)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> FakeLoad:
    fake = FakeLoad()
    monkeypatch.setattr(mlc_llm.cli.bench, "load_subject", fake)
    monkeypatch.setattr(BandwidthMeter, "__init__", lambda self, num_threads: None)
    monkeypatch.setattr(BandwidthMeter, "read_gb_s", lambda self: 20.0)
    monkeypatch.setattr(BandwidthMeter, "close", lambda self: None)
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    return fake


def test_a_table_is_printed(load: FakeLoad, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "model, q4f16_1, cpu:0, 3 threads"
    for words in ("tokens/s", "prefill 512", "decode 128, batch 1, context 32", "weights read"):
        assert any(words in line for line in lines), words
    assert "measuring prefill 512 ..." in captured.err
    assert load.runner.is_closed
    # One warm-up and five repeats; 512 tokens in chunks of 24.
    assert len(load.runner.steps) == 6 * (22 + 128)


def test_options_reach_their_places(load: FakeLoad, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = (
        "model --quantization q8f16_1 --device cpu --opt O1 --prefill 5,6 --decode 3 --batch 1,2 "
        "--overrides max_batch_size=4;context_window_size=50 --context 0,4 --repeats 2 --warmup 0 "
        f"--threads 1 --seed 9 --json {output}"
    )
    assert main(["bench", *arguments.split()]) == 0
    assert load.subject == Subject(
        "model",
        None,
        "q8f16_1",
        "cpu",
        "O1",
        {"max_batch_size": 4, "context_window_size": 50},
        None,
        9,
    )
    assert load.workloads == [
        "prefill 5",
        "prefill 6",
        "decode 3, batch 1, context 0",
        "decode 3, batch 2, context 0",
        "decode 3, batch 1, context 4",
        "decode 3, batch 2, context 4",
    ]
    assert os.environ["TVM_NUM_THREADS"] == "1"
    report = json.loads(output.read_text())
    assert [len(m["runs"]) for m in report["measurements"]] == [2] * 6
    assert (report["opt"], report["threads"], report["bandwidth_gb_s"]) == ("O1", 3, 20.0)


def test_a_given_library_has_no_level(load: FakeLoad, tmp_path: Path) -> None:
    library, output = tmp_path / "lib.so", tmp_path / "out.json"
    library.touch()
    assert main(["bench", "m", "--model-lib", str(library), "--json", str(output)]) == 0
    assert load.subject is not None and load.subject.library == library
    assert json.loads(output.read_text())["opt"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("m --prefill 1,x", 2, "--prefill '1,x' is not a list of whole numbers"),
        ("m --prefill 1,,2", 2, "--prefill '1,,2' is not a list of whole numbers"),
        ("m --batch 0", 2, "--batch is 0; it must be at least 1"),
        ("m --batch 2,2", 2, "--batch '2,2' names a number twice"),
        ("m --context -1", 2, "--context is -1"),
        ("m --decode -1", 2, "--decode is -1"),
        ("m --prefill 0 --decode 0", 2, "leave nothing to measure"),
        ("m --repeats 0", 2, "--repeats is 0; it must be at least 1"),
        ("m --warmup -1", 2, "--warmup is -1"),
        ("m --seed -1", 2, "--seed is -1"),
        ("m --threads 0", 2, "0 threads were asked for"),
        ("m --threads 99999", 2, "99999 threads were asked for"),
        ("m --device gpu", 2, "'gpu'"),
        ("m --overrides size=1", 2, "unknown key 'size'"),
        ("m --model-lib no.so", 1, "--model-lib no.so does not exist"),
        ("m --opt O1 --overrides opt=O2", 2, "use one"),
        ("m --random-weights config.json", 2, "both name a model; use one"),
        ("--random-weights c.json --model-lib {file}", 2, "--model-lib has no use"),
        ("m --json no/such/out.json", 2, "--json no/such/out.json: there is no directory no/such"),
        ("m --plot no/such/out.png", 2, "there is no directory no/such"),
        ("m --plot out.jpg", 2, "only .png files"),
    ],
)
def test_mistakes_are_explained_before_anything_is_loaded(  # type: ignore[no-untyped-def]
    load: FakeLoad, tmp_path: Path, capsys, arguments: str, code: int, words: str
) -> None:
    library = tmp_path / "lib.so"
    library.touch()
    assert main(["bench", *arguments.format(file=library).split()]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert captured.out == ""
    assert load.workloads == []


def test_a_plot_needs_matplotlib(load: FakeLoad, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "m", "--plot", "out.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert load.workloads == []


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    directory = tmp_path / "home"
    monkeypatch.setenv("MLC_LLM_HOME", str(directory))
    for name in ("MLC_JIT_POLICY", "MLC_DOWNLOAD_CACHE_POLICY"):
        monkeypatch.delenv(name, raising=False)
    return directory


@pytest.mark.cpu
@pytest.mark.parametrize("quantization", ["q4f16_1", "q0f16"])
def test_random_weights_are_measured_as_a_whole(  # type: ignore[no-untyped-def]
    home: Path, tmp_path: Path, capsys, quantization: str
) -> None:
    config, output = tmp_path / "tiny.json", tmp_path / "out.json"
    config.write_text(json.dumps(TINY))
    arguments = (
        f"bench --random-weights {config} --quantization {quantization} --prefill 40 --decode 3 "
        f"--batch 1,3 --context 20 --repeats 2 --overrides prefill_chunk_size=16 --json {output}"
    )
    assert main(arguments.split()) == 0
    report = json.loads(output.read_text())
    assert report["model"] == f"{config} (random weights)"
    assert report["quantization"] == quantization
    assert report["device"] == "cpu:0" and report["threads"] >= 1
    assert report["compile_s"] > 0 and report["load_s"] > 0
    assert 0.5 < report["bandwidth_gb_s"] < 5000
    # Two layers and the head, each weight in its own memory: at least their packed size.
    num_weights = 250 * 64 + 2 * (64 * 128 + 64 * 64 + 3 * 64 * 96)
    bits = {"q4f16_1": 4.5, "q0f16": 16}[quantization]
    assert 1 < report["weight_bytes"] / (num_weights * bits / 8) < 1.3
    names = [(m["name"], m["tokens"], m["batch"], m["context"]) for m in report["measurements"]]
    assert names == [("prefill", 40, 1, 0), ("decode", 3, 1, 20), ("decode", 3, 3, 20)]
    for found in report["measurements"]:
        rates = [found["tokens"] * found["batch"] / seconds for seconds in found["runs"]]
        assert len(rates) == 2
        assert (found["min"], found["max"]) == pytest.approx((min(rates), max(rates)))
    assert "decode 3, batch 3, context 20" in capsys.readouterr().out
    assert not (home / "model_weights").exists()
    assert not list(home.rglob("packed-*"))

    assert main(arguments.split()) == 0
    assert json.loads(output.read_text())["compile_s"] is None


@pytest.mark.cpu
def test_a_model_is_prepared_and_measured(  # type: ignore[no-untyped-def]
    home: Path, stories260k: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out.json"
    arguments = f"--prefill 8 --decode 2 --repeats 1 --warmup 0 --json {output}"
    assert main(["bench", str(stories260k), *arguments.split()]) == 0
    report = json.loads(output.read_text())
    assert (report["model"], report["quantization"]) == (str(stories260k), "q4f16_1")
    assert [m["name"] for m in report["measurements"]] == ["prefill", "decode"]
    assert "Converting" in capsys.readouterr().err


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--prefill 129", "129 tokens do not fit the context window of 128"),
        ("--prefill 1 --context 128 --decode 1", "--overrides context_window_size=129"),
        ("--prefill 1 --batch 129 --decode 1", "--overrides max_batch_size=129"),
    ],
)
def test_more_than_the_library_allows_is_refused(  # type: ignore[no-untyped-def]
    home: Path, tmp_path: Path, capsys, arguments: str, words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 1}))
    assert main(["bench", "--random-weights", str(tmp_path), *arguments.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 1, "config.json does not exist"),
        ("{", 1, "not valid JSON"),
        ("{}", 1, "architecture not named is not supported"),
        (json.dumps({"architectures": ["LlamaForCausalLM"]}), 1, "lacks num_attention_heads"),
    ],
)
def test_a_bad_configuration_is_explained(  # type: ignore[no-untyped-def]
    home: Path, tmp_path: Path, capsys, content: str | None, code: int, words: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["bench", "--random-weights", str(tmp_path)]) == code
    assert words in capsys.readouterr().err


@pytest.mark.cpu
def test_random_models_say_numbers_and_share_no_memory(home: Path, tmp_path: Path) -> None:
    import numpy as np

    from mlc_llm.bench.random_weights import random_parameters
    from mlc_llm.bench.workloads import Workload, make_steps
    from mlc_llm.cli.bench_model import load_subject
    from mlc_llm.prepare.progress import NullProgress
    from mlc_llm.runtime.library import load_library
    from mlc_llm.runtime.memory import as_array

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    subject = Subject(None, tmp_path, "q0f16", "cpu", "O2", {}, None, 5)
    workload = Workload("prefill", 30)
    loaded = load_subject(subject, [workload], NullProgress())
    [step] = make_steps(workload, loaded.runner.metadata, seed=0)
    logits = loaded.runner.forward(step)
    assert logits.shape == (1, 250)
    assert np.isfinite(logits).all() and logits.std() > 1e-3
    pages = [as_array(page) for page in loaded.runner._pages]  # type: ignore[attr-defined]
    assert all(page.any() for page in pages)
    loaded.runner.touch_pages()  # type: ignore[attr-defined]
    assert not any(page.any() for page in pages)

    [path] = (home / "model_lib").glob("llama-q0f16-*")
    arrays = random_parameters(load_library(path), 0, seed=5)
    starts = sorted((array.ctypes.data, array.nbytes) for array in arrays)
    for (start, size), (following, _) in itertools.pairwise(starts):
        assert start + size <= following
