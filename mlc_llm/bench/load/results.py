"""What a load found: percentiles and rates, as JSON and as rows of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlc_llm.bench.load.drive import Load, Run

RATES_HEADER = (
    "", "requests", "errors", "requests/s", "output tokens/s", "total tokens/s",
    "prompt", "cached", "output", "client CPU",
)  # fmt: skip
LATENCY_HEADER = ("", "", "mean", "p50", "p90", "p99")
_NAMES = {
    "ttft_s": "first token",
    "tpot_s": "each later token",
    "itl_s": "between events",
    "latency_s": "whole answer",
}
# Above this share of a core, the generator may itself be what limits the figures.
_BUSY = 0.7
# Above this share of cached prompt tokens, prompts were not new to the server.
_CACHED = 0.25


@dataclass(frozen=True)
class Figures:
    """Mean and percentiles of a number of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Figures | None:
        """Return the figures, None where there is nothing to count."""
        if not seconds:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
        return Figures(float(np.mean(seconds)), p50, p90, p99)


@dataclass(frozen=True)
class Result:
    """One load and its run."""

    load: Load
    run: Run

    @property
    def latencies(self) -> dict[str, Figures | None]:
        """Return the figures of all requests that were answered, by name."""
        done = [record for record in self.run.records if record.error is None]
        return {
            "ttft_s": Figures.of([r.ttft_s for r in done if r.ttft_s is not None]),
            "tpot_s": Figures.of([r.tpot_s for r in done if r.tpot_s is not None]),
            "itl_s": Figures.of([gap for r in done for gap in r.gaps_s]),
            "latency_s": Figures.of([r.latency_s for r in done]),
        }

    @property
    def errors(self) -> dict[str, int]:
        """Return how often requests failed, by kind."""
        return dict(Counter(r.error for r in self.run.records if r.error is not None))

    def detail_of(self, kind: str) -> str:
        """Return what was said of the first failure of a kind."""
        return next((r.detail for r in self.run.records if r.error == kind), "")

    @property
    def num_answered(self) -> int:
        """Return the number of requests that were answered."""
        return sum(record.error is None for record in self.run.records)

    @property
    def output_tokens_per_s(self) -> float:
        """Return the tokens of all answers over the time of the run."""
        return self._sum("output_tokens") / self.run.wall_s

    @property
    def notes(self) -> list[str]:
        """Return what a reader of the figures must know."""
        notes = []
        for kind, count in self.errors.items():
            detail = self.detail_of(kind)
            notes.append(f"{self.load.label}: {count} failed with {kind}: {detail}")
        done = [record for record in self.run.records if record.error is None]
        if not all(record.is_counted for record in done):
            notes.append(
                f"{self.load.label}: no usage from the server; tokens are events with text"
            )
        if self._sum("cached_tokens") > _CACHED * self._sum("prompt_tokens"):
            notes.append(
                f"{self.load.label}: the server had much of the prompts in its cache; "
                "for prompts that it has not seen, change --seed"
            )
        if self.run.client_cpu > _BUSY:
            notes.append(
                f"{self.load.label}: the generator used {self.run.client_cpu:.0%} of a core "
                "and may be what limits the figures"
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return everything but single requests."""
        output, prompt = self._sum("output_tokens"), self._sum("prompt_tokens")
        return {
            "clients": self.load.clients,
            "rate": self.load.rate,
            "wall_s": self.run.wall_s,
            "requests": len(self.run.records),
            "answered": self.num_answered,
            "errors": self.errors,
            "prompt_tokens": prompt,
            "cached_tokens": self._sum("cached_tokens"),
            "output_tokens": output,
            "requests_per_s": self.num_answered / self.run.wall_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "total_tokens_per_s": (output + prompt) / self.run.wall_s,
            **{
                name: None if figures is None else vars(figures)
                for name, figures in self.latencies.items()
            },
            "client_cpu": self.run.client_cpu,
        }

    def rates_row(self) -> tuple[str, ...]:
        """Return the cells under `RATES_HEADER`; lengths are means."""
        data = self.to_json()
        count = max(1, self.num_answered)
        return (
            self.load.label,
            str(data["requests"]),
            str(sum(self.errors.values())),
            f"{data['requests_per_s']:,.2f}",
            f"{data['output_tokens_per_s']:,.1f}",
            f"{data['total_tokens_per_s']:,.1f}",
            *(
                f"{data[name] / count:,.1f}"
                for name in ("prompt_tokens", "cached_tokens", "output_tokens")
            ),
            f"{self.run.client_cpu:.0%}",
        )

    def latency_rows(self) -> list[tuple[str, ...]]:
        """Return the cells under `LATENCY_HEADER`, in milliseconds."""
        rows: list[tuple[str, ...]] = []
        for name, figures in self.latencies.items():
            cells = (
                [""] * 4
                if figures is None
                else [f"{1000 * x:,.1f}" for x in vars(figures).values()]
            )
            rows.append((self.load.label if not rows else "", _NAMES[name], *cells))
        return rows

    def _sum(self, name: str) -> int:
        return sum(getattr(record, name) for record in self.run.records if record.error is None)
