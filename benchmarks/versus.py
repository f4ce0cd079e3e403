"""Compare mlc_llm with its rivals: same shapes, same threads, in alternating rounds.

Knows rounds, medians and tables. How an engine is run is in `rivals/`; `install_rivals.py` has
put the rivals in place before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import (
    DEFAULT_HOME,
    MEASURES,
    Disturbance,
    Engine,
    EngineFailed,
    Measure,
    Shape,
    last_json_line,
    run_process,
    shape_names,
)
from rivals.llama_cpp_q4_0 import LlamaCpp
from rivals.onnxruntime_int4 import ONNXRuntime
from rivals.openvino_int4 import OpenVINO
from rivals.ours import MlcLlm

_HERE = Path(__file__).parent
_OURS = MlcLlm.name
# Above this share of processor time taken by others, a round is reported as disturbed.
_DISTURBED = 0.05
# Engine name -> figures of each repeat, for each round it lived through.
Rounds = dict[str, dict[int, list[float]]]


@dataclass
class Comparison:
    """All figures of one measure on one shape."""

    measure: Measure
    rounds: Rounds = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)  # GB/s, once a round
    int8_peak: float | None = None  # tera-operations a second
    disturbances: list[float] = field(default_factory=list)  # share of others, each process

    def add(self, engine: str, number: int, figures: list[float], disturbance: float) -> None:
        """Keep what an engine gave in a round."""
        self.rounds.setdefault(engine, {})[number] = figures
        self.disturbances.append(disturbance)

    def figure(self, engine: str) -> float:
        """Return the median over rounds of the medians of their repeats."""
        return statistics.median(self._medians(engine).values())

    def spread(self, engine: str) -> float:
        """Return how far the rounds lie apart, as a share of their median."""
        medians = self._medians(engine).values()
        return (max(medians) - min(medians)) / self.figure(engine)

    def rivals(self) -> list[str]:
        """Return the names of the engines that are not ours, the best one first."""
        names = [name for name in self.rounds if name != _OURS]
        return sorted(names, key=self.figure, reverse=self.measure.is_more_better)

    def advantage(self, rival: str) -> float | None:
        """Return how many times better ours is: the median over the rounds that both have."""
        ours, theirs = self._medians(_OURS), self._medians(rival)
        both = ours.keys() & theirs.keys()
        if not both:
            return None
        ratio = statistics.median(ours[number] / theirs[number] for number in both)
        return ratio if self.measure.is_more_better else 1 / ratio

    def _medians(self, engine: str) -> dict[int, float]:
        rounds = self.rounds.get(engine, {})
        return {number: statistics.median(figures) for number, figures in rounds.items()}

    def to_json(self) -> dict[str, Any]:
        """Return everything, for `--json`."""
        return {
            "measure": self.measure.name,
            "unit": self.measure.unit,
            "rounds": self.rounds,
            "medians": {name: self.figure(name) for name in self.rounds},
            "spreads": {name: self.spread(name) for name in self.rounds},
            "advantages": {name: self.advantage(name) for name in self.rivals()},
            "bandwidth_gb_s": self.bandwidth,
            "int8_tera_ops": self.int8_peak,
            "disturbances": self.disturbances,
        }


@dataclass(frozen=True)
class Plan:
    """How often, and with what, everything is measured."""

    rounds: int
    threads: int
    patience_s: float


def compare(engines: Sequence[Engine], shape: Shape, measure: Measure, plan: Plan) -> Comparison:
    """Run a measure on every engine that has it, each round beginning with another one."""
    comparison = Comparison(measure)
    able = [engine for engine in engines if measure.kind in engine.measures()]
    if measure.kind == "prefill":
        comparison.int8_peak = measure_machine(plan.threads, "--int8")
    for number in range(plan.rounds):
        if measure.kind == "decode":
            comparison.bandwidth.append(measure_machine(plan.threads))
        first = number % len(able) if able else 0
        for engine in able[first:] + able[:first]:
            try:
                figures, share = _measure_quietly(engine, shape, measure, plan)
            except EngineFailed as error:
                _say(f"FAILED {engine.name}, {shape.name}, {measure.name}: {error}")
                continue
            comparison.add(engine.name, number, figures, share)
            note = f" (others took {share:.0%} of the processors)" if share > _DISTURBED else ""
            median = statistics.median(figures)
            _say(
                f"{shape.name} {measure.name} round {number + 1}: {engine.name} {median:.4g}{note}"
            )
    return comparison


def _measure_quietly(
    engine: Engine, shape: Shape, measure: Measure, plan: Plan
) -> tuple[list[float], float]:
    """Return an engine's figures and the share others took, the least within the patience."""
    deadline = time.monotonic() + plan.patience_s
    attempts = []
    while True:
        await_quiet(deadline)
        others = Disturbance()
        figures = engine.measure(shape, measure, plan.threads)
        attempts.append((others.share(), figures))
        if attempts[-1][0] <= _DISTURBED or time.monotonic() >= deadline:
            share, figures = min(attempts, key=lambda attempt: attempt[0])
            return figures, share


def await_quiet(deadline: float) -> None:
    """Return when others leave the processors alone for a second, or at the deadline."""
    while time.monotonic() < deadline:
        others = Disturbance()
        time.sleep(1)
        if others.share() <= _DISTURBED:
            return


def measure_machine(threads: int, *options: str) -> float:
    """Return read bandwidth in GB/s, or with `--int8` tera-operations a second."""
    command = [sys.executable, str(_HERE / "machine.py"), "--threads", str(threads), *options]
    finished = run_process(command, environment={"PYTHONPATH": str(_HERE.parent)})
    return float(last_json_line(finished.output)["best"])


def linear_operations(config: Mapping[str, Any]) -> float:
    """Return the tera-operations of all linear layers for one token of a prompt, head left out."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    layer = hidden * (heads * head_dim + 3 * config["intermediate_size"])
    return 2 * float(config["num_hidden_layers"] * layer) / 1e12


def format_table(
    comparisons: Sequence[Comparison],
    engines: Sequence[Engine],
    shape: Shape,
    weight_bytes: Mapping[str, int],
) -> str:
    """Return a Markdown table: medians, spread over rounds, share of the machine, and ratios."""
    names = [engine.name for engine in engines]
    lines = [
        f"| {shape.name} | {' | '.join(names)} | ratio, best rival first |",
        "|---" * (len(names) + 2) + "|",
    ]
    for comparison in comparisons:
        cells = [_cell(comparison, name, shape, weight_bytes) for name in names]
        title = f"{comparison.measure.name} ({comparison.measure.unit})"
        lines.append(f"| {title} | {' | '.join(cells)} | {_verdict(comparison)} |")
    return "\n".join(lines)


def _cell(comparison: Comparison, name: str, shape: Shape, weight_bytes: Mapping[str, int]) -> str:
    if name not in comparison.rounds:
        return ""
    figure = comparison.figure(name)
    text = f"{figure:.4g} (spread {comparison.spread(name):.0%})"
    if comparison.bandwidth and comparison.measure.batch == 1 and name in weight_bytes:
        share = figure * weight_bytes[name] / 1e9 / statistics.median(comparison.bandwidth)
        text += f", {share:.0%} of bandwidth"
    if comparison.int8_peak is not None:
        share = figure * linear_operations(shape.config) / comparison.int8_peak
        text += f", {share:.0%} of int8 peak"
    return text


def _verdict(comparison: Comparison) -> str:
    advantages = [(comparison.advantage(rival), rival) for rival in comparison.rivals()]
    return ", ".join(f"{ratio:.2f} x {rival}" for ratio, rival in advantages if ratio is not None)


def describe_machine() -> dict[str, Any]:
    """Return processor, number of cores this process may use, and memory."""
    model = platform.processor()
    details = Path("/proc/cpuinfo")
    if details.exists():
        lines = details.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if "model name" in x), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load_before": os.getloadavg()[0],
    }


def prepare(engines: Sequence[Engine], shape: Shape) -> dict[str, int]:
    """Make every engine's form of the model; return the bytes of weights of each."""
    run_process(
        [sys.executable, _HERE / "make_models.py", "--home", shape.home, "--shape", shape.name]
    )
    for engine in engines:
        _say(f"{shape.name}: preparing {engine.name}")
        engine.make_model(shape)
    return {engine.name: engine.weight_bytes(shape) for engine in engines}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ends the process with a message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines = [kind.name for kind in ENGINES]
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help="where the rivals are")
    parser.add_argument("--shape", action="append", choices=shape_names(), help="all if left out")
    parser.add_argument("--measure", action="append", choices=MEASURES, help="all if left out")
    parser.add_argument("--engine", action="append", choices=engines, help="all if left out")
    parser.add_argument("--rounds", type=int, default=5, help="processes per engine and measure")
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine")
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait so long for a quiet machine before each process, and repeat disturbed ones",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures there")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


ENGINES = (MlcLlm, LlamaCpp, OpenVINO, ONNXRuntime)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print tables and return 1 if an engine failed."""
    options = parse_arguments(arguments)
    chosen = [kind for kind in ENGINES if kind.name in (options.engine or [kind.name])]
    engines: list[Engine] = [kind(options.home.resolve()) for kind in chosen]
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "threads": options.threads,
    }
    plan = Plan(options.rounds, options.threads, options.patience)
    tables = []
    shares: list[float] = []
    is_complete = True
    try:
        report["versions"] = {engine.name: engine.version() for engine in engines}
        for shape_name in options.shape or shape_names():
            shape = Shape.load(shape_name, options.home.resolve())
            weight_bytes = prepare(engines, shape)
            comparisons = [
                compare(engines, shape, MEASURES[name], plan)
                for name in options.measure or MEASURES
            ]
            report[shape_name] = {
                "weight_bytes": weight_bytes,
                "comparisons": [comparison.to_json() for comparison in comparisons],
            }
            is_complete &= all(_is_complete(x, engines, options.rounds) for x in comparisons)
            shares += [share for x in comparisons for share in x.disturbances]
            tables.append(format_table(comparisons, engines, shape, weight_bytes))
    except EngineFailed as error:
        _say(str(error))
        return 1
    finally:
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['date']}, {report['machine']}, {options.threads} threads")
    print("\n".join(f"- {name}: {text}" for name, text in report["versions"].items()))
    print("\n" + "\n\n".join(tables))
    num_disturbed = sum(share > _DISTURBED for share in shares)
    if num_disturbed:
        print(
            f"\n**{num_disturbed} of {len(shares)} processes were disturbed**: others took more "
            f"than {_DISTURBED:.0%} of the processors. Repeat this on a quiet machine."
        )
    return 0 if is_complete else 1


def _is_complete(comparison: Comparison, engines: Sequence[Engine], rounds: int) -> bool:
    kind = comparison.measure.kind
    able = [engine.name for engine in engines if kind in engine.measures()]
    return all(len(comparison.rounds.get(name, {})) == rounds for name in able)


if __name__ == "__main__":
    sys.exit(main())
