"""llama.cpp: Q4_0 throughout (`--pure`, the head too), driven through its own benchmark tools."""

from __future__ import annotations

import sys
from pathlib import Path

from engine import (
    EngineFailed,
    Measure,
    ServerCommand,
    Serving,
    Shape,
    last_json_line,
    run_process,
)

_MAKE_MODELS = Path(__file__).parent.parent / "make_models.py"


class LlamaCpp:
    """Built by `install_rivals.py` from the sources that llama-cpp-python ships."""

    name = "llama.cpp"

    def __init__(self, home: Path) -> None:
        self._home = home / "llama_cpp"

    def measures(self) -> frozenset[str]:
        """Return the kinds of measures it has."""
        return frozenset({"prefill", "decode", "first_token", "memory"})

    def version(self) -> str:
        """Return the version of llama-cpp-python. Raises EngineFailed if it is not built."""
        if not self._tool("llama-cli").exists():
            raise EngineFailed("llama.cpp is not built; run install_rivals.py")
        sources = next(self._home.glob("llama_cpp_python-*.tar.gz"))
        return f"Q4_0 pure, {sources.name.removesuffix('.tar.gz')}"

    def make_model(self, shape: Shape) -> None:
        """Quantize the checkpoint unless that is done."""
        target = self._model(shape)
        if target.exists():
            return
        run_process(
            [sys.executable, _MAKE_MODELS, "--home", shape.home, "--shape", shape.name, "--gguf"]
        )
        plain, unfinished = shape.directory / "model-f16.gguf", target.with_suffix(".part")
        run_process([self._tool("llama-quantize"), "--pure", plain, unfinished, "Q4_0", "2"])
        unfinished.rename(target)
        plain.unlink()

    def weight_bytes(self, shape: Shape) -> int:
        """Return the size of the GGUF file."""
        return self._model(shape).stat().st_size

    def measure(self, shape: Shape, measure: Measure, threads: int) -> list[float]:
        """Return the figures of all repeats. Raises EngineFailed."""
        model = ["-m", str(self._model(shape)), "-t", str(threads)]
        if measure.kind == "first_token":
            return [self._first_token(shape, model) for _ in range(measure.repeats)]
        if measure.kind == "decode" and measure.batch > 1:
            return [self._batched(model, measure) for _ in range(measure.repeats)]
        is_prefill = measure.kind == "prefill"
        finished = run_process(
            [
                self._tool("llama-bench"),
                *model,
                *("-p", str(measure.tokens if is_prefill else 0)),
                *("-n", str(0 if is_prefill else measure.tokens)),
                *("-d", str(measure.context)),
                *("-r", str(measure.repeats), "-o", "jsonl"),
            ]
        )
        if measure.kind == "memory":
            return [finished.peak_rss_bytes / 1e6]
        return [float(figure) for figure in last_json_line(finished.output)["samples_ts"]]

    def server(self, shape: Shape, serving: Serving, port: int) -> ServerCommand:
        """Return the command of `llama-server`; each slot has a context of its own."""
        cache = "--cache-prompt" if serving.has_prefix_cache else "--no-cache-prompt"
        words = [
            *(self._tool("llama-server"), "-m", self._model(shape), "-t", serving.threads),
            *("-np", serving.sequences, "-c", serving.sequences * serving.context, cache),
            *("--host", "127.0.0.1", "--port", port),
        ]
        return ServerCommand([str(word) for word in words], {})

    def _batched(self, model: list[str], measure: Measure) -> float:
        size = measure.batch * (measure.context + measure.tokens)
        finished = run_process(
            [
                self._tool("llama-batched-bench"),
                *model,
                *("-c", str(size), "-npp", str(measure.context), "-ntg", str(measure.tokens)),
                *("-npl", str(measure.batch), "--output-format", "jsonl"),
            ]
        )
        return float(last_json_line(finished.output)["speed_tg"])

    def _first_token(self, shape: Shape, model: list[str]) -> float:
        # Without a warm-up run, which only delays the first token.
        finished = run_process(
            [
                self._tool("llama-completion"),
                *model,
                *("-c", "4096", "-n", "1", "-p", shape.prompt, "--temp", "0"),
                *("-no-cnv", "--no-display-prompt", "--no-warmup", "--simple-io"),
            ]
        )
        return finished.first_output_s

    def _tool(self, name: str) -> Path:
        return self._home / "build" / "bin" / name

    def _model(self, shape: Shape) -> Path:
        return shape.directory / "model-q4_0.gguf"
