"""Metrics of engines as Prometheus text: names, types and labels as vLLM has them, own prefix.

Knows how values are shown, not when they are recorded. `prometheus_client` is imported on use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlc_llm.engine.metrics import EngineLoad, EngineMetrics, Histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

PREFIX = "mlc_llm_"

_GAUGES: dict[str, tuple[str, Callable[[EngineMetrics], float]]] = {
    "num_requests_running": (
        "Sequences that are being computed.",
        lambda metrics: metrics.read_load().num_running,
    ),
    "num_requests_waiting": (
        "Sequences that wait for their first or next step.",
        lambda metrics: metrics.read_load().num_waiting,
    ),
    "kv_cache_usage_perc": (
        "Share of KV pages that running sequences hold; 1 means all.",
        lambda metrics: _share_of_pages(metrics.read_load()),
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineMetrics], float]]] = {
    "prompt_tokens": (
        "Prompt tokens of requests that have started, cached ones included.",
        lambda metrics: metrics.prompt_tokens,
    ),
    "generation_tokens": ("Tokens generated.", lambda metrics: metrics.completion_tokens),
    "prefix_cache_queries": (
        "Prompt tokens that were looked up in the prefix cache.",
        lambda metrics: metrics.prompt_tokens,
    ),
    "prefix_cache_hits": (
        "Prompt tokens that were found in the prefix cache.",
        lambda metrics: metrics.cached_tokens,
    ),
    "num_preemptions": (
        "Times a sequence of an ended request gave up its pages to another.",
        lambda metrics: metrics.num_preemptions,
    ),
    "admission_rejections": (
        "Requests refused because too many were waiting.",
        lambda metrics: metrics.num_rejections,
    ),
    "failed_steps": (
        "Steps that failed, and their requests with them.",
        lambda metrics: metrics.num_failed_steps,
    ),
    "prefill_seconds": (
        "Time of steps with prompt tokens.",
        lambda metrics: metrics.prefill_s,
    ),
    "decode_seconds": (
        "Time of steps without prompt tokens.",
        lambda metrics: metrics.decode_s,
    ),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[EngineMetrics], Histogram]]] = {
    "time_to_first_token_seconds": (
        "Time from a request's arrival to its first token.",
        lambda metrics: metrics.first_token_s,
    ),
    "inter_token_latency_seconds": (
        "Time between two steps that brought tokens to a request.",
        lambda metrics: metrics.inter_token_s,
    ),
    "request_time_per_output_token_seconds": (
        "Mean time between tokens, of each request.",
        lambda metrics: metrics.time_per_output_token_s,
    ),
    "e2e_request_latency_seconds": (
        "Time from a request's arrival to its end.",
        lambda metrics: metrics.request_s,
    ),
    "request_queue_time_seconds": (
        "Time from a request's arrival to its first step.",
        lambda metrics: metrics.request_queue_s,
    ),
    "request_prefill_time_seconds": (
        "Time from a request's first step to its first token.",
        lambda metrics: metrics.request_prefill_s,
    ),
    "request_decode_time_seconds": (
        "Time from a request's first token to its last.",
        lambda metrics: metrics.request_decode_s,
    ),
    "request_inference_time_seconds": (
        "Time from a request's first step to its end.",
        lambda metrics: metrics.request_inference_s,
    ),
    "request_prompt_tokens": (
        "Prompt tokens of a request.",
        lambda metrics: metrics.request_prompt_tokens,
    ),
    "request_generation_tokens": (
        "Tokens generated for a request.",
        lambda metrics: metrics.request_generation_tokens,
    ),
    "iteration_tokens_total": (
        "Tokens computed in a step.",
        lambda metrics: metrics.step_tokens,
    ),
    "step_time_seconds": ("Time of a step.", lambda metrics: metrics.step_s),
    "step_time_outside_library_seconds": (
        "Time of a step that was not spent in compiled code.",
        lambda metrics: metrics.step_outside_s,
    ),
}


class MetricsCollector:
    """A collector for a `prometheus_client` registry, on engines by model name.

    With one engine named "" there is no label.
    """

    def __init__(
        self, engines: Mapping[str, EngineMetrics], *, with_histograms: bool = True
    ) -> None:
        self._engines = engines
        self._with_histograms = with_histograms
        self._labels = [] if set(engines) == {""} else ["model_name"]

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its present value."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        for name, (text, value_of) in _GAUGES.items():
            yield self._fill(GaugeMetricFamily(PREFIX + name, text, labels=self._labels), value_of)
        for name, (text, value_of) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=self._labels)
            yield self._fill(counter, value_of)
        ended = CounterMetricFamily(
            PREFIX + "request_success",
            "Requests that have ended, by reason.",
            labels=[*self._labels, "finished_reason"],
        )
        for labels, metrics in self._each():
            for reason, count in metrics.requests.items():
                ended.add_metric([*labels, reason], count)
        yield ended
        if not self._with_histograms:
            return
        for name, (text, histogram_of) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=self._labels)
            for labels, metrics in self._each():
                histogram = histogram_of(metrics)
                family.add_metric(labels, _cumulate(histogram), histogram.total)
            yield family

    def _each(self) -> Iterator[tuple[list[str], EngineMetrics]]:
        for name, metrics in self._engines.items():
            yield ([name] if self._labels else []), metrics

    def _fill(self, family: Any, value_of: Callable[[EngineMetrics], float]) -> Metric:
        for labels, metrics in self._each():
            family.add_metric(labels, value_of(metrics))
        metric: Metric = family
        return metric


def prometheus_text(engines: Mapping[str, EngineMetrics], *, with_histograms: bool = True) -> str:
    """Return the metrics of engines by model name as text, see `MetricsCollector`."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(engines, with_histograms=with_histograms))
    return generate_latest(registry).decode()


def _share_of_pages(load: EngineLoad) -> float:
    return load.num_used_pages / load.num_pages if load.num_pages > 0 else 0.0


def _cumulate(histogram: Histogram) -> list[tuple[str, float]]:
    """Return upper bounds as text, and how many values lie up to each."""
    total = 0
    buckets: list[tuple[str, float]] = []
    names = (*map(repr, histogram.bounds), "+Inf")
    for name, count in zip(names, list(histogram.counts), strict=True):
        total += count
        buckets.append((name, total))
    return buckets
