"""Timing of workloads on a runner: warm-up, repeats, and the machine's bandwidth between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from mlc_llm.bench.workloads import Workload, make_steps
from mlc_llm.runtime.runner import ModelRunner


@dataclass(frozen=True)
class Measurement:
    """Seconds of each run of a workload, and the read bandwidth between the runs in GB/s."""

    workload: Workload
    runs: tuple[float, ...]
    bandwidths: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each run, all sequences together."""
        return [self.workload.total_tokens / seconds for seconds in self.runs]

    @property
    def tokens_per_s(self) -> float:
        """Median of the runs."""
        return statistics.median(self.rates)

    @property
    def ms_per_token(self) -> float:
        """Milliseconds from one token of a sequence to its next; the median of the runs."""
        return 1000 * statistics.median(self.runs) / self.workload.tokens

    @property
    def bandwidth_gb_s(self) -> float:
        """Median of the bandwidths."""
        return statistics.median(self.bandwidths)

    def read_gb_s(self, weight_bytes: int) -> float | None:
        """Return the rate at which a decode reads the weights, once a step; None for a prefill."""
        if self.workload.name == "prefill":
            return None
        return weight_bytes / (self.ms_per_token / 1000) / 1e9


def measure(
    runner: ModelRunner,
    workload: Workload,
    *,
    repeats: int,
    warmup: int,
    seed: int,
    read_bandwidth: Callable[[], float],
    count: Callable[[int], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Run a workload `warmup` + `repeats` times and time the latter; `count` is told each run.

    The bandwidth is taken before, between and after the timed runs, because it moves with whatever
    else the machine does.
    """
    steps = make_steps(workload, runner.metadata, seed)
    runs, bandwidths = [], []
    for index in range(warmup + repeats):
        if index >= warmup:
            bandwidths.append(read_bandwidth())
        start = clock()
        for step in steps:
            runner.forward(step)
        seconds = clock() - start
        if index >= warmup:
            runs.append(seconds)
        count(1)
    bandwidths.append(read_bandwidth())
    return Measurement(workload, tuple(runs), tuple(bandwidths))
