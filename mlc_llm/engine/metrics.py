"""What requests and steps cost: statistics of one request, sums and histograms over all.

Recording is a few additions of plain numbers, by the one thread that runs the engine; any thread
may read. How it reads as Prometheus text is in `exposition.py`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

FINISH_REASONS = ("stop", "length", "abort", "error")

# Decode steps of more sequences than this share a place in `decode_time_by_batch_size`.
_MAX_BATCH_KEY = 64


@dataclass
class RequestStats:
    """Counts and times of one request, all of its sequences together.

    Fields that end _s and have a default of None are readings of `time.perf_counter`, in seconds.
    cached_tokens: prompt tokens found in the prefix cache. num_gaps: steps that brought tokens,
    after the first such. prefill_s: from the request's first step to its first token. decode_s:
    from there to its last token. finish_reason: that of the sequence that ended last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: str = "abort"
    num_preemptions: int = 0
    num_gaps: int = 0
    arrival_s: float | None = None
    start_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Return the rate over prompt tokens that were computed; None where there were none."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.prefill_s > 0 and computed > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Return the rate over tokens after the first; None for less than two."""
        later = self.completion_tokens - 1
        return later / self.decode_s if self.decode_s > 0 and later > 0 else None

    @property
    def queue_s(self) -> float | None:
        """Return the time from arrival to the first step, or to the end where there was none."""
        start = self.end_s if self.start_s is None else self.start_s
        return _difference(start, self.arrival_s)

    @property
    def ttft_s(self) -> float | None:
        """Return the time from arrival to the first token."""
        return _difference(self.first_token_s, self.arrival_s)

    @property
    def end_to_end_s(self) -> float | None:
        """Return the time from arrival to the end."""
        return _difference(self.end_s, self.arrival_s)

    @property
    def inter_token_s(self) -> float | None:
        """Return the mean time from one token to the next; None for less than two."""
        return self.decode_s / self.num_gaps if self.num_gaps > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return MLC LLM's per-request keys, and ours for what it does not know."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "prefill_tokens": self.prompt_tokens - self.cached_tokens,
            "decode_tokens": max(self.completion_tokens - 1, 0),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "end_to_end_latency_s": self.end_to_end_s,
            "ttft_s": self.ttft_s,
            "inter_token_latency_s": self.inter_token_s,
            "queue_s": self.queue_s,
            "num_preemptions": self.num_preemptions,
            "finish_reason": self.finish_reason,
        }


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


class Histogram:
    """Counts of values by bucket; `counts` has one place more than `bounds`, for what is above."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value; one equal to a bound belongs below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)


class EngineLoad(NamedTuple):
    """What an engine is at work on now."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_pages: int = 0
    num_pages: int = 0


_LATENCIES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
_FIRST_TOKENS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0),
)
_GAPS_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.0,
    5.0,
)
_OUTSIDE_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
_TOKENS = tuple(float(1 << power) for power in range(18))


class EngineMetrics:
    """Sums and histograms over all requests and steps of an engine.

    read_load tells what the engine is at work on; it is called from whatever thread reads.
    """

    def __init__(self, read_load: Callable[[], EngineLoad] = EngineLoad) -> None:
        self.read_load = read_load
        self.requests = dict.fromkeys(FINISH_REASONS, 0)  # that have ended, by finish reason
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.num_preemptions = 0
        self.num_rejections = 0  # requests refused because too many wait
        self.num_failed_steps = 0
        self.last_finished: RequestStats | None = None
        # The time of a step with prompt tokens is prefill, whole; that of the others decode.
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.decode_only_tokens = 0  # of steps without prompt tokens
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.decode_s_by_batch = [0.0] * (_MAX_BATCH_KEY + 1)
        self.decodes_by_batch = [0] * (_MAX_BATCH_KEY + 1)
        self.first_token_s = Histogram(_FIRST_TOKENS_S)
        self.inter_token_s = Histogram(_GAPS_S)
        self.time_per_output_token_s = Histogram(_GAPS_S)
        self.request_s = Histogram(_LATENCIES_S)
        self.request_queue_s = Histogram(_FIRST_TOKENS_S)
        self.request_prefill_s = Histogram(_FIRST_TOKENS_S)
        self.request_decode_s = Histogram(_LATENCIES_S)
        self.request_inference_s = Histogram(_LATENCIES_S)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)
        self.step_tokens = Histogram(_TOKENS[:15])
        self.step_s = Histogram(_GAPS_S)
        self.step_outside_s = Histogram(_OUTSIDE_S)

    def note_start(self, stats: RequestStats, now: float) -> None:
        """A request's first step begins; its prompt_tokens, cached_tokens, arrival_s are known."""
        stats.start_s = now
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        if stats.arrival_s is not None:
            self.request_queue_s.observe(now - stats.arrival_s)

    def note_token(self, stats: RequestStats, now: float) -> None:
        """Count a token of output (no stop token) that the step ending `now` brought."""
        stats.completion_tokens += 1
        self.completion_tokens += 1
        last = stats.last_token_s
        if last is None:
            stats.first_token_s = stats.last_token_s = now
            if stats.start_s is not None:
                stats.prefill_s = now - stats.start_s
            if stats.arrival_s is not None:
                self.first_token_s.observe(now - stats.arrival_s)
        elif now != last:  # another sequence's token of the same step is no gap
            stats.last_token_s = now
            stats.num_gaps += 1
            stats.decode_s += now - last
            self.inter_token_s.observe(now - last)

    def note_step(
        self, duration_s: float, library_s: float, num_prompt_tokens: int, num_decode_tokens: int
    ) -> None:
        """Count a step; library_s of its seconds were spent in compiled code."""
        self.step_tokens.observe(num_prompt_tokens + num_decode_tokens)
        self.step_s.observe(duration_s)
        self.step_outside_s.observe(duration_s - library_s)
        self.decode_tokens += num_decode_tokens
        if num_prompt_tokens > 0:
            self.prefill_tokens += num_prompt_tokens
            self.prefill_s += duration_s
        else:
            key = min(num_decode_tokens, _MAX_BATCH_KEY)
            self.decode_only_tokens += num_decode_tokens
            self.decode_s += duration_s
            self.decode_s_by_batch[key] += duration_s
            self.decodes_by_batch[key] += 1

    def add(self, stats: RequestStats) -> None:
        """Count a request that has ended, now unless end_s says when."""
        if stats.end_s is None:
            stats.end_s = time.perf_counter()
        if stats.start_s is not None and stats.first_token_s is None:
            stats.prefill_s = stats.end_s - stats.start_s
        self.requests[stats.finish_reason] += 1
        self.num_preemptions += stats.num_preemptions
        self.last_finished = stats
        if stats.arrival_s is not None:
            self.request_s.observe(stats.end_s - stats.arrival_s)
        if stats.start_s is None:
            return  # it never left the queue
        self.request_inference_s.observe(stats.end_s - stats.start_s)
        self.request_prefill_s.observe(stats.prefill_s)
        self.request_decode_s.observe(stats.decode_s)
        self.request_prompt_tokens.observe(stats.prompt_tokens)
        self.request_generation_tokens.observe(stats.completion_tokens)
        if stats.num_gaps > 0:
            self.time_per_output_token_s.observe(stats.decode_s / stats.num_gaps)

    def prometheus_text(self, *, with_histograms: bool = True) -> str:
        """Return everything, or counters and gauges only, in Prometheus' text format."""
        from mlc_llm.engine.exposition import prometheus_text

        return prometheus_text({"": self}, with_histograms=with_histograms)

    def to_dict(self) -> dict[str, Any]:
        """Return the values under MLC LLM's keys, and ours for what it does not know."""
        sizes = [size for size, count in enumerate(self.decodes_by_batch) if count > 0]
        load = self.read_load()
        return {
            "engine_prefill_time_sum": self.prefill_s,
            "engine_decode_time_sum": self.decode_s,
            "prompt_tokens_sum": self.prompt_tokens,
            "completion_tokens_sum": self.completion_tokens,
            "prefill_tokens_sum": self.prefill_tokens,
            "decode_tokens_sum": self.decode_tokens,
            "prefill_tokens_per_s": _rate(self.prefill_tokens, self.prefill_s),
            "decode_tokens_per_s": _rate(self.decode_only_tokens, self.decode_s),
            "last_finished_request": self.last_finished.to_dict() if self.last_finished else {},
            "decode_time_by_batch_size": {
                "mean": {
                    f"batch_size={size}": self.decode_s_by_batch[size] / self.decodes_by_batch[size]
                    for size in sizes
                },
                "count": {f"batch_size={size}": self.decodes_by_batch[size] for size in sizes},
            },
            "cached_tokens_sum": self.cached_tokens,
            "num_requests_running": load.num_running,
            "num_requests_waiting": load.num_waiting,
            "num_used_pages": load.num_used_pages,
            "num_pages": load.num_pages,
            "num_preemptions": self.num_preemptions,
            "num_rejections": self.num_rejections,
            "finished_requests": dict(self.requests),
        }


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
