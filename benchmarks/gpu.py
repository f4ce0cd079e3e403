"""All that a GPU is to show, in one command: right answers, then speed beside the GPU's limits.

    python benchmarks/gpu.py --device cuda >> figures.md

Correctness is tests/models/test_gpu_*.py and test_cuda_graph.py on the device. Speed is of the
shape of Llama-3.1-8B with random weights: decode of some batches beside the time in which the
weights can be read, and prefills beside the peak of the matrix units. Figures are rows of a
Markdown table for LOG.md. On a CPU it runs too (`--device cpu --layers 1`), which tests use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compile_devices import shape

if TYPE_CHECKING:
    from mlc_llm.bench.measure import Measurement
    from mlc_llm.cli.bench_model import LoadedModel

_ROOT = Path(__file__).parents[1]
_CHECKS = ("test_gpu_*.py", "test_cuda_graph.py")


@dataclass(frozen=True)
class Limits:
    """What a GPU can do at most: reading memory, and dense float16 in its matrix units."""

    gb_s: float
    tflops: float


# By a part of the name that the driver tells; from the makers' data sheets.
KNOWN_GPUS = {
    "H200": Limits(4800, 989),
    "H100 NVL": Limits(3900, 835),
    "H100 PCIe": Limits(2000, 756),
    "H100": Limits(3350, 989),
    "B200": Limits(8000, 2250),
    "A100-SXM4-80GB": Limits(2039, 312),
    "A100": Limits(1555, 312),
    "L40S": Limits(864, 362),
    "L4": Limits(300, 121),
    "RTX 4090": Limits(1008, 165),
    "RTX 3090": Limits(936, 71),
}


def main() -> int:
    """Print the figures; return 1 where an answer was wrong."""
    arguments = parse_arguments()
    status = 0 if arguments.no_checks else check(arguments.device)
    for quantization in arguments.quantization:
        measure_speed(arguments, quantization)
    return status


def parse_arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", nargs="+", default=["q0f16", "q4f16_1"])
    parser.add_argument("--opt", default="O2", help="as in 'O2;cudagraph=1'")
    parser.add_argument("--config", type=Path, help="config.json of another shape")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--context", type=int, default=512, help="tokens before a decode")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-gb-s", type=float, help="of a GPU that is not known")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU that is not known")
    parser.add_argument("--no-checks", action="store_true", help="speed alone")
    return parser.parse_args()


def check(device: str) -> int:
    """Run the tests of a GPU on the device; return whether one failed."""
    environment = {**os.environ, "MLC_LLM_TEST_DEVICE": device}
    tests = [str(path) for name in _CHECKS for path in sorted(_ROOT.glob(f"tests/models/{name}"))]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    status = subprocess.run(command, cwd=_ROOT, env=environment).returncode
    print(f"answers on {device}: {'right' if status == 0 else 'WRONG, see above'}\n", flush=True)
    return int(status != 0)


def measure_speed(arguments: argparse.Namespace, quantization: str) -> None:
    """Print a table for one quantization."""
    from mlc_llm.bench.bandwidth import GPUBandwidthMeter
    from mlc_llm.bench.measure import measure
    from mlc_llm.bench.workloads import plan_workloads

    workloads = plan_workloads(
        arguments.prefill, arguments.tokens, arguments.batch, [arguments.context]
    )
    loaded, library_s = load(arguments, quantization, workloads)
    with closing(loaded.runner):
        meter = GPUBandwidthMeter(loaded.device)
        limits = limits_of(loaded.device, arguments)
        peak = f"{limits.gb_s:,.0f} GB/s" if limits else "not known"
        print(
            f"{quantization}, {loaded.runner.metadata.kv_cache.num_layers} layers, "
            f"{loaded.device}: weights "
            f"{loaded.weight_bytes / 1e9:.2f} GB, bandwidth by data sheet {peak}, by copying "
            f"{meter.read_gb_s():,.0f} GB/s; compiled in {library_s}, loaded in "
            f"{loaded.load_s:.1f} s\n"
        )
        print("| work | median | spread | tokens/s | of the limit |")
        print("|---|---|---|---|---|")
        for workload in workloads:
            found = measure(
                loaded.runner,
                workload,
                repeats=arguments.repeats,
                warmup=2,
                seed=0,
                read_bandwidth=lambda: 0.0,
            )
            print(f"| {workload} | {figures(found, loaded, limits)} |", flush=True)
    print()


def load(
    arguments: argparse.Namespace, quantization: str, workloads: Sequence[object]
) -> tuple[LoadedModel, str]:
    """Return the shape's model with random weights, and how long it took to compile."""
    from mlc_llm.cli.bench_model import Subject, load_subject
    from mlc_llm.prepare.progress import NullProgress

    context = max(arguments.context + arguments.tokens, max(arguments.prefill))
    overrides = {
        "context_window_size": context,
        "prefill_chunk_size": min(2048, max(arguments.prefill)),
        "max_batch_size": max(arguments.batch),
    }
    with tempfile.TemporaryDirectory(prefix="mlc_llm-gpu-") as directory:
        config = arguments.config or Path(directory, "config.json")
        if arguments.config is None:
            config.write_text(json.dumps(shape(arguments.layers)))
        subject = Subject(
            None, config, quantization, arguments.device, arguments.opt, overrides, None, seed=0
        )
        loaded = load_subject(subject, workloads, NullProgress())
    return loaded, "the cache" if loaded.compile_s is None else f"{loaded.compile_s:.1f} s"


def limits_of(device: object, arguments: argparse.Namespace) -> Limits | None:
    """Return the limits of a GPU, None for one that is not known."""
    from mlc_llm.gpus import find_gpu

    if arguments.peak_gb_s and arguments.peak_tflops:
        return Limits(arguments.peak_gb_s, arguments.peak_tflops)
    if not device.is_gpu:
        return None
    name = find_gpu(device.name, device.id).name
    return next((limits for part, limits in KNOWN_GPUS.items() if part in name), None)


def figures(found: Measurement, loaded: LoadedModel, limits: Limits | None) -> str:
    """Return the cells of a measurement."""
    workload, runs = found.workload, found.runs
    if workload.name == "decode":
        unit, scale = "ms a token", 1000 / workload.tokens
        floor = limits and loaded.weight_bytes / limits.gb_s / 1e6  # ms
        share = f"{floor / found.ms_per_token:.0%} of the bandwidth" if floor else "not known"
    else:
        unit, scale = "ms", 1000.0
        linear = 2 * num_linear_weights(loaded) * workload.tokens / 1e12
        rate = linear / statistics.median(runs)
        share = f"{rate:,.1f} TFLOP/s"
        share += f", {rate / limits.tflops:.0%} of the peak" if limits else ""
    low, middle, high = (scale * take(runs) for take in (min, statistics.median, max))
    return f"{middle:.3f} {unit} | {low:.3f}-{high:.3f} | {found.tokens_per_s:,.0f} | {share}"


def num_linear_weights(loaded: LoadedModel) -> int:
    """Return how many weights the linear layers of a step multiply, those of a row's logits not."""
    config = loaded.runner.metadata.model_config
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * config["head_dim"] * (2 * heads + 2 * kv_heads)
    return int(config["num_hidden_layers"] * (attention + 3 * hidden * middle))


if __name__ == "__main__":
    sys.exit(main())
