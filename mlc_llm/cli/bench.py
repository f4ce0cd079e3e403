"""`mlc_llm bench`: measure how fast a model runs here, and print, store and draw the figures.

Knows the options and the order of the steps; what is measured and how is in `bench/`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlc_llm.cli.bench_model import Subject, load_subject
from mlc_llm.cli.open_model import (
    ModelArgument,
    ModelLibOption,
    OptOption,
    SourceQuantizationOption,
    ThreadsOption,
    optimization_level,
    require_library,
    use_threads,
)
from mlc_llm.cli.options import CHAT_OVERRIDES, DeviceOption, parse_overrides
from mlc_llm.cli.progress import show_progress
from mlc_llm.cli.terminal import say
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.bench.report import Report
    from mlc_llm.bench.workloads import Workload

_OVERRIDES = {**CHAT_OVERRIDES, "max_batch_size": int}
# Room for all columns; a terminal that is narrower wraps them, where rich would cut them off.
_TABLE_WIDTH = 160


def bench(
    model: ModelArgument = None,
    quantization: SourceQuantizationOption = None,
    device: DeviceOption = "auto",
    opt: OptOption = None,
    overrides: Annotated[
        str,
        typer.Option(
            metavar="K=V;K=V",
            help=f"Change the model's limits: {', '.join(_OVERRIDES)}.",
            show_default=False,
        ),
    ] = "",
    model_lib: ModelLibOption = None,
    random_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG",
            help="Make up weights for this Hugging Face config.json, in place of a MODEL.",
        ),
    ] = None,
    prefill: Annotated[
        str, typer.Option(metavar="N,N", help="Lengths of the prompts; 0 leaves prefill out.")
    ] = "512",
    decode: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens to decode for each sequence; 0 leaves decode out."),
    ] = 128,
    batch: Annotated[
        str, typer.Option(metavar="N,N", help="Numbers of sequences to decode at once.")
    ] = "1",
    context: Annotated[
        str,
        typer.Option(metavar="N,N", help="Tokens before the decoded ones, each with each batch."),
    ] = "32",
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed runs; the median counts.")] = 5,
    warmup: Annotated[int, typer.Option(metavar="N", help="Runs before them.")] = 1,
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(metavar="N", help="For tokens and made-up weights.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw them as .png; needs `pip install matplotlib`."),
    ] = None,
) -> None:
    """Measure prefill and decode of a model.

    GB/s are the bytes of the weights, without an embedding table that is only looked up, over the
    time of a decode step. The bandwidth they are compared with is the rate at which as many threads
    read 256 MB, each bound to a core, taken between the runs.
    """
    from mlc_llm.artifact import write_atomically
    from mlc_llm.bench.plot import draw
    from mlc_llm.bench.workloads import plan_workloads
    from mlc_llm.prepare.cache import storage_errors

    values = parse_overrides(overrides, _OVERRIDES)
    level = optimization_level(opt, values.pop("opt", None), model_lib)
    _require_at_least("--decode", decode, 0)
    workloads = plan_workloads(
        parse_sizes("--prefill", prefill, 0),
        decode,
        parse_sizes("--batch", batch, 1),
        parse_sizes("--context", context, 0),
    )
    _require_at_least("--repeats", repeats, 1)
    _require_at_least("--warmup", warmup, 0)
    _require_at_least("--seed", seed, 0)
    check_outputs(json_path, plot)
    require_library(model_lib)
    use_threads(threads)
    subject = Subject(model, random_weights, quantization, device, level, values, model_lib, seed)
    report = _measure(subject, workloads, repeats=repeats, warmup=warmup)
    _print_table(report)
    if json_path is not None:
        with storage_errors(json_path):
            write_atomically(json_path, json.dumps(report.to_json(), indent=2) + "\n")
    if plot is not None:
        with storage_errors(plot):
            draw(report, plot)


def parse_sizes(name: str, text: str, least: int) -> list[int]:
    """Return the whole numbers of a comma list, each once. Raises OptionError."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"{name} {text!r} is not a list of whole numbers, as in {name} 1,4,16"
        ) from None
    for size in sizes:
        _require_at_least(name, size, least)
    if len(set(sizes)) < len(sizes):
        raise OptionError(f"{name} {text!r} names a number twice; name each once")
    return sizes


def check_outputs(json_path: Path | None, plot: Path | None) -> None:
    """Raise OptionError if --json or --plot cannot be written, before anything is measured."""
    from mlc_llm.bench.plot import check_plot

    for name, path in (("--json", json_path), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise OptionError(f"{name} {path}: there is no directory {path.parent}; make it first")
    if plot is not None:
        check_plot(plot)


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise OptionError(f"{name} is {value}; it must be at least {least}")


def _measure(
    subject: Subject, workloads: Sequence[Workload], *, repeats: int, warmup: int
) -> Report:
    from mlc_llm.bench.bandwidth import BandwidthMeter, GPUBandwidthMeter
    from mlc_llm.bench.measure import measure
    from mlc_llm.bench.report import Report, peak_rss_bytes
    from mlc_llm.device import parse_device

    parse_device(subject.device)
    with show_progress() as progress:
        loaded = load_subject(subject, workloads, progress)
    measurements = []
    device = loaded.device
    made = GPUBandwidthMeter(device) if device.is_gpu else BandwidthMeter(loaded.threads)
    with closing(loaded.runner), closing(made) as meter:
        for workload in workloads:
            # No bar: drawing it would take time from the threads that are measured.
            say(f"measuring {workload} ...")
            measurements.append(
                measure(
                    loaded.runner,
                    workload,
                    repeats=repeats,
                    warmup=warmup,
                    seed=subject.seed,
                    read_bandwidth=meter.read_gb_s,
                )
            )
        peak = peak_rss_bytes()
    return Report(
        model=subject.label,
        quantization=loaded.quantization,
        device=str(device),
        opt=None if subject.library is not None else subject.opt,
        threads=loaded.threads,
        measurements=measurements,
        weight_bytes=loaded.weight_bytes,
        peak_rss_bytes=peak,
        load_s=loaded.load_s,
        compile_s=loaded.compile_s,
    )


def _print_table(report: Report) -> None:
    from mlc_llm.bench.report import HEADER

    print(f"{report.model}, {report.quantization}, {report.device}, {report.threads} threads")
    print_table(HEADER, report.rows())
    print(report.summary())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells under a header; columns that have no name are flush left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=_TABLE_WIDTH).print(table)
