"""The script for GPUs, on the CPU: every part of it runs, and its figures are what they say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from reference_cases import get_case

from mlc_llm import gpus
from mlc_llm.bench.measure import Measurement
from mlc_llm.bench.workloads import Workload
from mlc_llm.device import CPU, Device

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu


@pytest.mark.cpu
def test_a_whole_run(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("MLC_LLM_HOME", str(tmp_path))
    config = get_case("llama_gqa").directory / "config.json"
    words = f"gpu.py --device cpu --config {config} --no-checks --batch 1 2 --prefill 8"
    words += " --context 8 --tokens 2 --repeats 2 --quantization q4f16_1"
    monkeypatch.setattr(sys, "argv", words.split())
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("q4f16_1, 2 layers, cpu:0: weights ")
    rows = [line for line in lines if line.startswith(("| prefill", "| decode"))]
    assert [row.split(" | ")[0] for row in rows] == [
        "| prefill 8",
        "| decode 2, batch 1, context 8",
        "| decode 2, batch 2, context 8",
    ]


def test_shares_of_the_limits() -> None:
    limits = gpu.KNOWN_GPUS["H200"]
    config = {
        **{"num_hidden_layers": 2, "hidden_size": 100, "intermediate_size": 300},
        **{"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 10},
    }
    runner = SimpleNamespace(metadata=SimpleNamespace(model_config=config))
    loaded = SimpleNamespace(runner=runner, weight_bytes=4_800_000_000)
    # Queries, keys, values and outputs; gate, up and down.
    assert gpu.num_linear_weights(loaded) == 2 * (100 * (100 + 50 + 50 + 100) + 3 * 100 * 300)
    decode = Measurement(Workload("decode", 10), (0.02, 0.02, 0.04), (0.0,))
    assert gpu.figures(decode, loaded, limits) == (
        "2.000 ms a token | 2.000-4.000 | 500 | 50% of the bandwidth"
    )
    prefill = Measurement(Workload("prefill", 512), (0.5,), (0.0,))
    assert "TFLOP/s, 0% of the peak" in gpu.figures(prefill, loaded, limits)
    assert gpu.figures(decode, loaded, None).endswith("not known")


def test_limits_of_gpus(monkeypatch) -> None:
    none = argparse.Namespace(peak_gb_s=None, peak_tflops=None)
    named = gpus.GPU("cuda", 0, "NVIDIA H200")
    monkeypatch.setattr(gpus, "gpus_of", lambda kind: (named,))
    assert gpu.limits_of(Device("cuda"), none) == gpu.KNOWN_GPUS["H200"]
    assert gpu.limits_of(CPU, none) is None
    given = argparse.Namespace(peak_gb_s=10.0, peak_tflops=2.0)
    assert gpu.limits_of(CPU, given) == gpu.Limits(10.0, 2.0)


def test_wrong_answers_are_told(monkeypatch, capsys) -> None:
    seen = []

    def run(command, **options):
        seen.append(options["env"]["MLC_LLM_TEST_DEVICE"])
        tests = [Path(part).name for part in command if part.endswith(".py")]
        assert {"test_gpu_forward.py", "test_gpu_recurrent.py", "test_cuda_graph.py"} <= set(tests)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.check("cuda:3") == 1
    assert seen == ["cuda:3"]
    assert "WRONG" in capsys.readouterr().out
