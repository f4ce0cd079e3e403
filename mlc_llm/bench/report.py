"""What a benchmark found, as JSON and as rows of a table."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlc_llm
from mlc_llm.bench.measure import Measurement

HEADER = ("", "tokens/s", "(min - max)", "ms/token", "GB/s", "of bandwidth")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy")


@dataclass(frozen=True)
class Report:
    """All measurements of a run, and what they were made with.

    weight_bytes: bytes of weights a decode step reads. opt: None for a library that was given.
    compile_s: None where no compilation was needed.
    """

    model: str
    quantization: str
    device: str
    opt: str | None
    threads: int
    measurements: Sequence[Measurement]
    weight_bytes: int
    peak_rss_bytes: int | None
    load_s: float
    compile_s: float | None

    @property
    def bandwidth_gb_s(self) -> float:
        """Median of all bandwidths that were measured."""
        return statistics.median(gb_s for m in self.measurements for gb_s in m.bandwidths)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        return {
            "model": self.model,
            "quantization": self.quantization,
            "device": self.device,
            "opt": self.opt,
            "threads": self.threads,
            "versions": _versions(),
            "measurements": [_measurement_json(m, self.weight_bytes) for m in self.measurements],
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "weight_bytes": self.weight_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "load_s": self.load_s,
            "compile_s": self.compile_s,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of text under `HEADER` for each measurement."""
        return [_row(m, self.weight_bytes) for m in self.measurements]

    def summary(self) -> str:
        """Return one line on memory and time."""
        parts = [
            f"weights read a step {self.weight_bytes / 1e6:,.1f} MB",
            f"read bandwidth {self.bandwidth_gb_s:.1f} GB/s",
        ]
        if self.peak_rss_bytes is not None:
            note = "" if self.compile_s is None else " with the compiler"
            parts.append(f"peak memory {self.peak_rss_bytes / 1e6:,.0f} MB{note}")
        parts.append(f"loaded in {self.load_s:.2f} s")
        if self.compile_s is not None:
            parts.append(f"compiled in {self.compile_s:.1f} s")
        return ", ".join(parts)


def _measurement_json(measurement: Measurement, weight_bytes: int) -> dict[str, Any]:
    workload = measurement.workload
    return {
        "name": workload.name,
        "tokens": workload.tokens,
        "batch": workload.batch,
        "context": workload.context,
        "tokens_per_s": measurement.tokens_per_s,
        "min": min(measurement.rates),
        "max": max(measurement.rates),
        "runs": list(measurement.runs),
        "read_gb_s": measurement.read_gb_s(weight_bytes),
        "bandwidth_gb_s": measurement.bandwidth_gb_s,
    }


def _row(measurement: Measurement, weight_bytes: int) -> tuple[str, ...]:
    rates = measurement.rates
    read = measurement.read_gb_s(weight_bytes)
    return (
        str(measurement.workload),
        f"{measurement.tokens_per_s:,.1f}",
        f"({min(rates):,.1f} - {max(rates):,.1f})",
        f"{measurement.ms_per_token:,.2f}",
        "" if read is None else f"{read:,.1f}",
        "" if read is None else f"{100 * read / measurement.bandwidth_gb_s:.0f} %",
    )


def _versions() -> dict[str, str]:
    ours = {"mlc_llm": mlc_llm.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in _PACKAGES}


def peak_rss_bytes() -> int | None:
    """Return the most memory this process has had in RAM, None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, this leaves out what the parent process had
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
