"""Compare the server of mlc_llm with llama-server: same shapes, same clients, alternating rounds.

Knows rounds and tables; what is measured of a server is in `serving_cases.py`, how one is started
in `rivals/`. `install_rivals.py --rival llama.cpp` has built the rival before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import (
    DEFAULT_HOME,
    Disturbance,
    EngineFailed,
    Measure,
    Serving,
    ServingEngine,
    Shape,
    running_server,
    shape_names,
)
from rivals.llama_cpp_q4_0 import LlamaCpp
from rivals.ours import MlcLlm
from serving_cases import measure_load, measure_second_turn, measure_stall, outside_share
from versus import Comparison, await_quiet, describe_machine, prepare

from mlc_llm.bench.load.prompts import Lengths
from mlc_llm.errors import MlcError

ENGINES: Mapping[str, Callable[[Path], ServingEngine]] = {
    MlcLlm.name: MlcLlm,
    LlamaCpp.name: LlamaCpp,
}
# Above this share of processor time taken by others, a process is reported as disturbed.
_DISTURBED = 0.05
_SLACK = 64  # tokens of context beside prompt and answer
_SECOND_TURNS = 3
Figures = dict[Measure, float]


@dataclass(frozen=True)
class Plan:
    """How much of everything is measured."""

    rounds: int
    threads: int
    clients: Sequence[int]
    requests: int  # of each client
    prompt_len: int
    output_len: int
    streams: int
    stream_len: int
    long_prompt_len: int
    chat_len: int
    patience_s: float

    @property
    def lengths(self) -> Lengths:
        """Return the lengths of the requests under load."""
        return Lengths(self.prompt_len, self.output_len)


# A case starts what servers it needs and returns its figures; `seed` differs between rounds.
Case = Callable[[ServingEngine, Shape, Plan, int], Figures]


def run_load(engine: ServingEngine, shape: Shape, plan: Plan, seed: int) -> Figures:
    """Measure throughput and latency with each number of clients."""
    context = plan.prompt_len + plan.output_len + _SLACK
    serving = Serving(plan.threads, max(plan.clients), context)
    figures: Figures = {}
    with running_server(engine, shape, serving) as url:
        for clients in plan.clients:
            # The prompts of another number of clients would be in the prefix cache.
            own_seed = 1000 * seed + clients
            result = measure_load(url, clients, plan.lengths, clients * plan.requests, own_seed)
            figures[Measure(f"output, {clients} clients", "output")] = result.output_tokens_per_s
            for name, key in (("first token", "ttft_s"), ("each later token", "tpot_s")):
                latency = result.latencies[key]
                if latency is None:
                    raise EngineFailed(f"no answer had a {name}")
                figures[Measure(f"{name}, {clients} clients", "latency")] = latency.mean
            figures[Measure(f"generator, {clients} clients", "share")] = 100 * result.run.client_cpu
    return figures


def run_overhead(engine: ServingEngine, shape: Shape, plan: Plan, seed: int) -> Figures:
    """Measure the share of steps outside compiled code; only our server tells it."""
    if engine.name != MlcLlm.name:
        return {}
    lengths = Lengths(16, 128)
    serving = Serving(plan.threads, max(plan.clients), 256)
    with running_server(engine, shape, serving) as url:
        return {
            Measure(f"step outside the library, {clients} clients", "share"): outside_share(
                url, clients, lengths, clients * plan.requests, 1000 * seed + clients
            )
            for clients in plan.clients
        }


def run_stall(engine: ServingEngine, shape: Shape, plan: Plan, seed: int) -> Figures:
    """Measure what a long prompt does to running streams."""
    context = plan.long_prompt_len + plan.stream_len + _SLACK
    with running_server(engine, shape, Serving(plan.threads, plan.streams + 1, context)) as url:
        worst, first_s = measure_stall(
            url, plan.streams, plan.long_prompt_len, plan.stream_len, seed
        )
    title = f"{plan.long_prompt_len}-token prompt among {plan.streams} streams"
    return {
        Measure(f"{title}: longest gap over median", "times"): worst,
        Measure(f"{title}: its first token", "latency"): first_s,
    }


def run_second_turn(engine: ServingEngine, shape: Shape, plan: Plan, seed: int) -> Figures:
    """Measure the second turn of a chat with and without the prefix cache."""
    times = {}
    for has_cache in (True, False):
        serving = Serving(plan.threads, 1, plan.chat_len + 4 * _SLACK, has_cache)
        with running_server(engine, shape, serving) as url:
            times[has_cache] = measure_second_turn(url, plan.chat_len, _SECOND_TURNS, 100 * seed)
    title = f"second turn after {plan.chat_len} tokens"
    return {
        Measure(f"{title}: first token", "latency"): times[True],
        Measure(f"{title}: first token, no prefix cache", "latency"): times[False],
        Measure(f"{title}: share of the time that is left with the cache", "share"): (
            100 * times[True] / times[False]
        ),
    }


CASES: Mapping[str, Case] = {
    "load": run_load,
    "overhead": run_overhead,
    "stall": run_stall,
    "second_turn": run_second_turn,
}


def compare(
    engines: Sequence[ServingEngine], shape: Shape, names: Sequence[str], plan: Plan
) -> tuple[list[Comparison], int]:
    """Run cases on every engine, each round beginning with another one.

    Returns the figures and how often an engine failed.
    """
    comparisons: dict[Measure, Comparison] = {}
    num_failed = 0
    for name in names:
        for number in range(plan.rounds):
            first = number % len(engines)
            for engine in [*engines[first:], *engines[:first]]:
                await_quiet(time.monotonic() + plan.patience_s)
                others = Disturbance()
                try:
                    figures = CASES[name](engine, shape, plan, number)
                except (EngineFailed, MlcError) as error:
                    _say(f"FAILED {engine.name}, {shape.name}, {name}: {error}")
                    num_failed += 1
                    continue
                share = others.share()
                for measure, figure in figures.items():
                    comparison = comparisons.setdefault(measure, Comparison(measure))
                    comparison.add(engine.name, number, [figure], share)
                    _say(
                        f"{shape.name} round {number + 1}, {measure.name}: {engine.name} "
                        f"{figure:.4g} {measure.unit}"
                    )
                if share > _DISTURBED:
                    _say(f"others took {share:.0%} of the processors")
    return list(comparisons.values()), num_failed


def format_table(
    comparisons: Sequence[Comparison], engines: Sequence[ServingEngine], shape: Shape
) -> str:
    """Return a Markdown table: medians, spread over rounds, and how many times better ours is."""
    names = [engine.name for engine in engines]
    lines = [f"| {shape.name} | {' | '.join(names)} | ratio |", "|---" * (len(names) + 2) + "|"]
    for comparison in comparisons:
        cells = [
            f"{comparison.figure(name):.4g} (spread {comparison.spread(name):.0%})"
            if name in comparison.rounds
            else ""
            for name in names
        ]
        ratios = [comparison.advantage(rival) for rival in comparison.rivals()]
        # Shares are of each engine's own time; a ratio of them would mean nothing.
        is_own = comparison.measure.kind == "share"
        shown = "" if is_own else ", ".join(f"{r:.2f} x" for r in ratios if r is not None)
        title = f"{comparison.measure.name} ({comparison.measure.unit})"
        lines.append(f"| {title} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ends the process with a message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--home", type=Path, default=DEFAULT_HOME, help="where the rivals are")
    add("--shape", action="append", choices=shape_names(), help="all if left out")
    add("--case", action="append", choices=CASES, help="all if left out")
    add("--engine", action="append", choices=ENGINES, help="all if left out")
    add("--clients", default="1,4,16", metavar="N,N", help="numbers of clients")
    numbers = {
        "--rounds": (3, "servers started per engine and case"),
        "--threads": (2, "threads of every server"),
        "--requests": (4, "of each client"),
        "--prompt-len": (139, "tokens of a prompt under load"),
        "--output-len": (64, "tokens of an answer under load"),
        "--streams": (4, "streams that run when a long prompt comes"),
        "--stream-len": (1024, "tokens of those streams"),
        "--long-prompt-len": (4000, "tokens of the long prompt"),
        "--chat-len": (2000, "tokens of the first turn of a chat"),
    }
    for name, (default, text) in numbers.items():
        add(name, type=int, default=default, metavar="N", help=f"{text} ({default})")
    add(
        "--patience",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait so long for a quiet machine before each server",
    )
    add("--json", type=Path, metavar="OUT", help="write all figures there")
    options = parser.parse_args(arguments)
    for name in numbers:
        if getattr(options, name[2:].replace("-", "_")) < 1:
            parser.error(f"{name} must be at least 1")
    try:
        options.clients = [int(word) for word in options.clients.split(",")]
    except ValueError:
        parser.error(f"--clients {options.clients!r} is not a list of whole numbers")
    if min(options.clients) < 1:
        parser.error("--clients must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print tables and return 1 if an engine failed."""
    options = parse_arguments(arguments)
    home = options.home.resolve()
    engines = [ENGINES[name](home) for name in options.engine or ENGINES]
    plan = Plan(
        rounds=options.rounds,
        threads=options.threads,
        clients=options.clients,
        requests=options.requests,
        prompt_len=options.prompt_len,
        output_len=options.output_len,
        streams=options.streams,
        stream_len=options.stream_len,
        long_prompt_len=options.long_prompt_len,
        chat_len=options.chat_len,
        patience_s=options.patience,
    )
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "plan": vars(plan),
    }
    tables, shares, num_failed = [], [], 0
    try:
        report["versions"] = {engine.name: engine.version() for engine in engines}
        for name in options.shape or shape_names():
            shape = Shape.load(name, home)
            prepare(engines, shape)
            comparisons, failures = compare(engines, shape, options.case or list(CASES), plan)
            report[name] = [comparison.to_json() for comparison in comparisons]
            tables.append(format_table(comparisons, engines, shape))
            shares += [share for x in comparisons for share in x.disturbances]
            num_failed += failures
    except EngineFailed as error:
        _say(str(error))
        return 1
    finally:
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['date']}, {report['machine']}, {options.threads} threads")
    print("\n".join(f"- {name}: {text}" for name, text in report["versions"].items()))
    print("\n" + "\n\n".join(tables))
    disturbed = [share for share in shares if share > _DISTURBED]
    if disturbed:
        print(
            f"\n**{len(disturbed)} of {len(shares)} figures were disturbed**: others took up to "
            f"{max(disturbed):.0%} of the processors. Repeat this on a quiet machine."
        )
    return 1 if num_failed else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
