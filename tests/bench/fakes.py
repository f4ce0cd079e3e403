"""A runner that computes nothing, and metadata of a library that was never compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_llm.artifact import KVCacheLayout, LibraryMetadata
from mlc_llm.bench.measure import Measurement
from mlc_llm.bench.report import Report
from mlc_llm.bench.workloads import Workload
from mlc_llm.runtime.runner import Step

METADATA = LibraryMetadata(
    model_type="llama",
    quantization="q4f16_1",
    context_window_size=100,
    sliding_window_size=-1,
    attention_sink_size=-1,
    prefill_chunk_size=24,
    max_batch_size=8,
    vocab_size=50,
    params=[],
    kv_cache=KVCacheLayout(
        num_layers=2, num_key_value_heads=1, head_dim=8, page_size=16, dtype="float16"
    ),
    memory_usage={},
    target={},
    isa=[],
    compiler_version="0",
)


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """Remembers the steps; step i takes `seconds[i]` on its clock, the last one's ever after."""

    def __init__(self, seconds: list[float] | None = None) -> None:
        self.metadata = METADATA
        self.num_pages = 100
        self.steps: list[Step] = []
        self.clock = FakeClock()
        self.is_closed = False
        self._seconds = seconds or [0.0]

    def forward(self, step: Step) -> NDArray[Any]:
        self.clock.now += self._seconds[min(len(self.steps), len(self._seconds) - 1)]
        self.steps.append(step)
        return np.zeros((len(step.logit_rows), METADATA.vocab_size), np.float32)

    def close(self) -> None:
        self.is_closed = True


def make_report(*measurements: Measurement, **changes: Any) -> Report:
    """Return a report with made-up figures."""
    values: dict[str, Any] = {
        "model": "tiny",
        "quantization": "q4f16_1",
        "device": "cpu:0",
        "opt": "O2",
        "threads": 2,
        "measurements": list(measurements),
        "weight_bytes": 2_000_000_000,
        "peak_rss_bytes": 3_000_000_000,
        "load_s": 0.25,
        "compile_s": None,
    }
    return Report(**{**values, **changes})


def make_decode(batch: int = 1, context: int = 32) -> Measurement:
    """Return a decode of 10 tokens that took 1, 2 and 4 s at 10, 20 and 30 GB/s."""
    workload = Workload("decode", 10, batch, context)
    return Measurement(workload, (1.0, 4.0, 2.0), (10.0, 20.0, 30.0))


def make_prefill(tokens: int = 100) -> Measurement:
    """Return a prefill that took 1 and 2 s."""
    return Measurement(Workload("prefill", tokens), (1.0, 2.0), (20.0, 20.0))
