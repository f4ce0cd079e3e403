"""OpenVINO GenAI, int4. Imported it is the adapter; run as a script, in its own environment, it
measures one thing and prints the figures as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Measure, Shape


class OpenVINO:
    """Installed by `install_rivals.py`; the model comes from optimum-cli."""

    name = "openvino"

    def __init__(self, home: Path) -> None:
        self._programs = home / "openvino" / "venv" / "bin"

    def measures(self) -> frozenset[str]:
        """Return the kinds of measures it has."""
        return frozenset({"prefill", "decode", "memory"})

    def version(self) -> str:
        """Return the installed version. Raises EngineFailed if there is none."""
        from engine import installed_version

        return f"int4, {installed_version(self._python, 'openvino-genai')}"

    def make_model(self, shape: Shape) -> None:
        """Export the checkpoint unless that is done."""
        from engine import run_process

        target = shape.directory / "openvino"
        if target.exists():
            return
        # Groups must divide the hidden size.
        group = 128 if shape.config["hidden_size"] % 128 == 0 else 64
        unfinished = shape.directory / "openvino.part"
        run_process(
            [
                *(self._programs / "optimum-cli", "export", "openvino"),
                *("--model", shape.checkpoint, "--task", "text-generation-with-past"),
                *("--weight-format", "int4", "--sym", "--group-size", str(group)),
                *("--ratio", "1.0", unfinished),
            ],
            environment={"HF_HUB_OFFLINE": "1"},
        )
        unfinished.rename(target)

    def weight_bytes(self, shape: Shape) -> int:
        """Return the size of the weights file."""
        return (shape.directory / "openvino" / "openvino_model.bin").stat().st_size

    def measure(self, shape: Shape, measure: Measure, threads: int) -> list[float]:
        """Return the figures of all repeats. Raises EngineFailed."""
        from engine import run_driver

        return run_driver(
            self._python, Path(__file__), shape.directory / "openvino", measure, threads
        )

    @property
    def _python(self) -> Path:
        return self._programs / "python"


def measure_here(request: dict[str, Any]) -> list[float]:
    """Load the model and return tokens/s of each repeat, after one that does not count."""
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(
        request["model"], "CPU", INFERENCE_NUM_THREADS=request["threads"]
    )
    prompt_len = request["context"] or request["tokens"]
    new_tokens = 1 if request["kind"] == "prefill" else request["tokens"] + 1
    figures = []
    for repeat in range(request["repeats"] + 1):
        first_s, rest_s = _generate(pipeline, prompt_len, request["batch"], new_tokens, repeat)
        if request["kind"] == "prefill":
            figures.append(request["batch"] * prompt_len / first_s)
        else:
            figures.append(request["batch"] * request["tokens"] / rest_s)
    return figures[1:]


def _generate(
    pipeline: Any, prompt_len: int, batch: int, new_tokens: int, seed: int
) -> tuple[float, float]:
    """Return the seconds to the first token and from there to the last."""
    import numpy as np
    import openvino
    import openvino_genai

    # Fresh tokens each time: the pipeline keeps the keys and values of earlier prompts.
    tokens = np.random.default_rng(seed).integers(300, 40_000, (batch, prompt_len))
    inputs = openvino_genai.TokenizedInputs(
        openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens))
    )
    config = openvino_genai.GenerationConfig(
        max_new_tokens=new_tokens, ignore_eos=True, do_sample=False
    )
    start = time.perf_counter()
    result = pipeline.generate(inputs, config)
    total_s = time.perf_counter() - start
    first_s = result.perf_metrics.get_ttft().mean / 1000
    return first_s, total_s - first_s


if __name__ == "__main__":
    print(json.dumps({"figures": measure_here(json.loads(sys.argv[1]))}))
