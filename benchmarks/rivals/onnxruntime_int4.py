"""ONNX Runtime GenAI, int4. Imported it is the adapter; run as a script, in its own environment,
it measures one thing and prints the figures as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Measure, Shape


class ONNXRuntime:
    """Installed by `install_rivals.py`; the model comes from its own model builder."""

    name = "onnxruntime"

    def __init__(self, home: Path) -> None:
        self._python = home / "onnxruntime" / "venv" / "bin" / "python"

    def measures(self) -> frozenset[str]:
        """Return the kinds of measures it has."""
        return frozenset({"prefill", "decode", "memory"})

    def version(self) -> str:
        """Return the installed version. Raises EngineFailed if there is none."""
        from engine import installed_version

        return f"int4, {installed_version(self._python, 'onnxruntime-genai')}"

    def make_model(self, shape: Shape) -> None:
        """Build the model unless that is done."""
        from engine import run_process

        target = shape.directory / "onnxruntime"
        if target.exists():
            return
        unfinished = shape.directory / "onnxruntime.part"
        run_process(
            [
                *(self._python, "-m", "onnxruntime_genai.models.builder"),
                *("-i", shape.checkpoint, "-o", unfinished, "-p", "int4", "-e", "cpu"),
                *("-c", shape.directory / "onnxruntime.cache"),
                *("--extra_options", "int4_accuracy_level=4", "int4_block_size=32"),
            ],
            environment={"HF_HUB_OFFLINE": "1"},
        )
        unfinished.rename(target)

    def weight_bytes(self, shape: Shape) -> int:
        """Return the size of the weights file."""
        return (shape.directory / "onnxruntime" / "model.onnx.data").stat().st_size

    def measure(self, shape: Shape, measure: Measure, threads: int) -> list[float]:
        """Return the figures of all repeats. Raises EngineFailed."""
        from engine import run_driver

        return run_driver(
            self._python, Path(__file__), shape.directory / "onnxruntime", measure, threads
        )


def measure_here(request: dict[str, Any]) -> list[float]:
    """Load the model and return tokens/s of each repeat, after one that does not count."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(request["model"])
    options = {"session_options": {"intra_op_num_threads": request["threads"]}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = onnxruntime_genai.Model(config)
    prompt_len = request["context"] or request["tokens"]
    num_steps = 0 if request["kind"] == "prefill" else request["tokens"]
    figures = []
    for repeat in range(request["repeats"] + 1):
        first_s, rest_s = _generate(model, prompt_len, request["batch"], num_steps, repeat)
        if request["kind"] == "prefill":
            figures.append(request["batch"] * prompt_len / first_s)
        else:
            figures.append(request["batch"] * num_steps / rest_s)
    return figures[1:]


def _generate(
    model: Any, prompt_len: int, batch: int, num_steps: int, seed: int
) -> tuple[float, float]:
    """Return the seconds to the first token and from there to the last."""
    import numpy as np
    import onnxruntime_genai

    tokens = np.random.default_rng(seed).integers(300, 40_000, (batch, prompt_len))
    length = prompt_len + num_steps + 2
    settings = onnxruntime_genai.GeneratorParams(model)
    # The least length equals the greatest, so that an end token does not end the run.
    settings.set_search_options(
        max_length=length, min_length=length, batch_size=batch, do_sample=False
    )
    generator = onnxruntime_genai.Generator(model, settings)
    start = time.perf_counter()
    generator.append_tokens(tokens.astype(np.int32))
    generator.generate_next_token()
    middle = time.perf_counter()
    for _ in range(num_steps):
        generator.generate_next_token()
    return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    print(json.dumps({"figures": measure_here(json.loads(sys.argv[1]))}))
