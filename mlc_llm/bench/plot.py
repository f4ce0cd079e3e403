"""The picture of a report: tokens a second over batch, context and prompt length.

Needs matplotlib, which is not installed with mlc_llm by itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlc_llm.bench.measure import Measurement
from mlc_llm.bench.report import Report
from mlc_llm.bench.workloads import Workload
from mlc_llm.errors import OptionError


def check_plot(path: Path) -> None:
    """Raise OptionError if a picture cannot be drawn or `path` names no PNG file."""
    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot {path}: only .png files are written; change the name")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(
            "--plot needs matplotlib, which is not installed; run `pip install matplotlib`"
        )


def draw(report: Report, path: Path) -> None:
    """Write a PNG with one panel for each thing that was measured; bars span min to max."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = plan_panels(report.measurements)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report.model}, {report.quantization}, {report.threads} threads")
    for index, (title, x_label, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), index)
        for label, points in lines.items():
            _draw_line(axes, label, points)
        axes.set(title=title, xlabel=x_label, ylabel="tokens/s", ylim=(0, None))
        axes.set_xticks(sorted({x for line in lines.values() for x, _ in line}))
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend()
    figure.savefig(path, format="png", dpi=150)


Line = list[tuple[int, Measurement]]


def plan_panels(measurements: Sequence[Measurement]) -> list[tuple[str, str, dict[str, Line]]]:
    """Return title, name of the x axis and lines by label of each panel."""
    decodes = [m for m in measurements if m.workload.name == "decode"]
    prefills = [m for m in measurements if m.workload.name == "prefill"]
    panels = []
    if prefills:
        lines = _lines(prefills, lambda w: w.tokens, lambda _: "")
        panels.append(("prefill", "tokens of the prompt", lines))
    num_contexts = len({m.workload.context for m in decodes})
    if len(decodes) > num_contexts or num_contexts == 1:
        lines = _lines(decodes, lambda w: w.batch, lambda w: f"context {w.context:,}")
        panels.append(("decode", "sequences", lines))
    if num_contexts > 1:
        lines = _lines(decodes, lambda w: w.context, lambda w: f"batch {w.batch}")
        panels.append(("decode", "tokens of context", lines))
    return panels


def _lines(
    measurements: Sequence[Measurement],
    x_of: Callable[[Workload], int],
    label_of: Callable[[Workload], str],
) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for measurement in measurements:
        point = x_of(measurement.workload), measurement
        lines.setdefault(label_of(measurement.workload), []).append(point)
    return {label: sorted(line, key=lambda point: point[0]) for label, line in lines.items()}


def _draw_line(axes: Any, label: str, line: Line) -> None:
    y = [m.tokens_per_s for _, m in line]
    below = [m.tokens_per_s - min(m.rates) for _, m in line]
    above = [max(m.rates) - m.tokens_per_s for _, m in line]
    axes.errorbar([x for x, _ in line], y, [below, above], label=label, marker="o", capsize=3)
