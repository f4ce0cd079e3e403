"""The picture of a serving benchmark: throughput against the time of a token, one point a load.

Needs matplotlib, which is not installed with mlc_llm by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlc_llm.bench.load.results import Result


def points(results: Sequence[Result]) -> list[tuple[float, float, str]]:
    """Return mean TPOT in ms, output tokens/s and label of each load that has both."""
    found = []
    for result in results:
        tpot = result.latencies["tpot_s"]
        if tpot is not None:
            found.append((1000 * tpot.mean, result.output_tokens_per_s, result.load.label))
    return found


def draw(title: str, results: Sequence[Result], path: Path) -> None:
    """Write a PNG; better is up (throughput) and left (latency)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    line = points(results)
    axes.plot([x for x, _, _ in line], [y for _, y, _ in line], marker="o")
    for x, y, label in line:
        axes.annotate(label, (x, y), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.set(
        title=title,
        xlabel="mean time of each token after the first (ms)",
        ylabel="output tokens/s, all clients",
        # Room for the labels, which are to the right of the points.
        xlim=(0, 1.2 * max(x for x, _, _ in line)) if line else None,
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
