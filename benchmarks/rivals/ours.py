"""mlc_llm of this checkout, in q4f16_1: `bench`, `chat` and `compile` as users run them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engine import Finished, Measure, ServerCommand, Serving, Shape, run_process

_ROOT = Path(__file__).parents[2]
_QUANTIZATION = "q4f16_1"


class MlcLlm:
    """Run by the interpreter that runs the comparison; keeps its cache under `home`."""

    name = "mlc_llm"

    def __init__(self, home: Path) -> None:
        self._home = home / "mlc_llm"

    def measures(self) -> frozenset[str]:
        """Return the kinds of measures it has."""
        return frozenset({"prefill", "decode", "first_token", "memory", "compile"})

    def version(self) -> str:
        """Return the commit."""
        commit = run_process(["git", "-C", _ROOT, "describe", "--always", "--dirty"]).output
        return f"{_QUANTIZATION}, commit {commit.strip()}"

    def make_model(self, shape: Shape) -> None:
        """Convert and compile the checkpoint by answering one prompt, which fills the cache."""
        self._home.mkdir(parents=True, exist_ok=True)
        self._answer(shape)

    def weight_bytes(self, shape: Shape) -> int:
        """Return the bytes of the quantized tensors, from a report of `bench`."""
        report = self._bench(shape, Measure("size", "decode", tokens=1, context=1), threads=1)
        return int(report["weight_bytes"])

    def measure(self, shape: Shape, measure: Measure, threads: int) -> list[float]:
        """Return the figures of all repeats. Raises EngineFailed."""
        if measure.kind == "first_token":
            return [self._answer(shape).first_output_s for _ in range(measure.repeats)]
        if measure.kind == "compile":
            return [self._compile(shape).seconds]
        report = self._bench(shape, measure, threads)
        if measure.kind == "memory":
            # Not the peak seen from here, which counts the child that measures bandwidth.
            return [int(report["peak_rss_bytes"]) / 1e6]
        (entry,) = report["measurements"]
        return [measure.batch * measure.tokens / float(seconds) for seconds in entry["runs"]]

    def server(self, shape: Shape, serving: Serving, port: int) -> ServerCommand:
        """Return the command of `mlc_llm serve`."""
        limits = {
            "max_num_sequence": serving.sequences,
            "context_window_size": serving.context,
            "max_total_seq_length": serving.sequences * serving.context,
        }
        words = [
            *(sys.executable, "-m", "mlc_llm", "serve", shape.checkpoint),
            *("--quantization", _QUANTIZATION, "--mode", "server"),
            *("--overrides", ";".join(f"{name}={value}" for name, value in limits.items())),
            *("--prefix-cache-mode", "radix" if serving.has_prefix_cache else "disable"),
            *("--host", "127.0.0.1", "--port", port),
        ]
        environment = {**self._environment, "TVM_NUM_THREADS": str(serving.threads)}
        return ServerCommand([str(word) for word in words], environment)

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "MLC_LLM_HOME": str(self._home / "cache"),
            "PYTHONPATH": str(_ROOT),
            "PYTHONDONTWRITEBYTECODE": "",  # an installed package has its bytecode
        }

    def _bench(self, shape: Shape, measure: Measure, threads: int) -> dict[str, Any]:
        report = self._home / "bench.json"
        report.unlink(missing_ok=True)
        lengths = ["--prefill", measure.tokens, "--decode", 0]
        if measure.kind != "prefill":
            lengths = ["--prefill", 0, "--decode", measure.tokens]
            lengths += ["--batch", measure.batch, "--context", measure.context]
        self._run(
            *("bench", shape.checkpoint, "--quantization", _QUANTIZATION, *lengths),
            *("--repeats", measure.repeats, "--threads", threads, "--json", report),
        )
        data: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return data

    def _answer(self, shape: Shape) -> Finished:
        return self._run(
            *("chat", shape.checkpoint, "--quantization", _QUANTIZATION),
            *("--prompt", shape.prompt, "--max-tokens", 1, "--temperature", 0),
        )

    def _compile(self, shape: Shape) -> Finished:
        library = self._home / "compiled.so"
        return self._run(
            "compile", shape.checkpoint, "--quantization", _QUANTIZATION, "-o", library
        )

    def _run(self, *arguments: object) -> Finished:
        words = [sys.executable, "-m", "mlc_llm", *map(str, arguments)]
        return run_process(words, environment=self._environment)
