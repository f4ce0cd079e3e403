"""What is recorded of requests and steps, and that Prometheus can read it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mlc_llm.engine.exposition import MetricsCollector, prometheus_text
from mlc_llm.engine.metrics import EngineLoad, EngineMetrics, Histogram, RequestStats

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> tuple[dict[str, str], Samples]:
    """Return the type of each family and the value of each sample."""
    families = list(text_string_to_metric_families(text))
    samples: Samples = {}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return {family.name: family.type for family in families}, samples


def record_request(metrics: EngineMetrics, reason: str = "stop") -> RequestStats:
    """Record 20 prompt tokens, 16 of them cached, and 3 tokens that take 0.25 s each."""
    stats = RequestStats(prompt_tokens=20, cached_tokens=16, arrival_s=10.0)
    metrics.note_start(stats, 10.5)
    for now in (11.5, 11.75, 12.0):
        metrics.note_token(stats, now)
    stats.finish_reason, stats.end_s = reason, 12.25
    metrics.add(stats)
    return stats


def test_times_of_a_request() -> None:
    stats = record_request(EngineMetrics())
    assert stats.queue_s == 0.5
    assert stats.ttft_s == 1.5
    assert stats.end_to_end_s == 2.25
    assert (stats.prefill_s, stats.decode_s, stats.inter_token_s) == (1.0, 0.5, 0.25)
    assert stats.prefill_tokens_per_s == 4.0
    assert stats.decode_tokens_per_s == 4.0
    assert stats.completion_tokens == 3
    known = stats.to_dict()
    assert known["end_to_end_latency_s"] == 2.25 and known["inter_token_latency_s"] == 0.25
    assert known["prefill_tokens"] == 4 and known["decode_tokens"] == 2


def test_a_request_that_has_only_arrived_has_no_times() -> None:
    stats = RequestStats(prompt_tokens=4, arrival_s=1.0)
    values = [stats.queue_s, stats.ttft_s, stats.end_to_end_s, stats.inter_token_s]
    assert values == [None] * 4
    assert stats.prefill_tokens_per_s is None and stats.decode_tokens_per_s is None
    assert RequestStats().to_dict()["ttft_s"] is None


def test_a_request_that_never_left_the_queue() -> None:
    metrics = EngineMetrics()
    before = time.perf_counter()
    stats = RequestStats(prompt_tokens=4, arrival_s=before)
    metrics.add(stats)
    assert before <= stats.end_s <= time.perf_counter()
    assert stats.queue_s == stats.end_to_end_s
    assert metrics.requests == {"stop": 0, "length": 0, "abort": 1, "error": 0}
    assert metrics.request_s.count == 1
    assert metrics.request_inference_s.count == metrics.request_prompt_tokens.count == 0


def test_a_request_without_output_has_spent_its_time_on_the_prompt() -> None:
    metrics = EngineMetrics()
    stats = RequestStats(prompt_tokens=4, arrival_s=1.0)
    metrics.note_start(stats, 2.0)
    stats.end_s, stats.finish_reason = 5.0, "stop"
    metrics.add(stats)
    assert stats.prefill_s == 3.0 and stats.ttft_s is None
    assert metrics.first_token_s.count == 0 and metrics.time_per_output_token_s.count == 0


def test_tokens_of_one_step_are_no_gap() -> None:
    metrics = EngineMetrics()
    stats = RequestStats(prompt_tokens=4, arrival_s=1.0)
    metrics.note_start(stats, 1.0)
    for now in (2.0, 2.0, 2.0, 3.0, 3.0, 3.0):  # three sequences, two steps
        metrics.note_token(stats, now)
    assert stats.completion_tokens == metrics.completion_tokens == 6
    assert stats.num_gaps == metrics.inter_token_s.count == 1
    assert metrics.first_token_s.count == 1
    assert stats.inter_token_s == 1.0 and stats.decode_tokens_per_s == 5.0


@pytest.mark.parametrize(
    ("value", "place"), [(0.0, 0), (-1.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (2.1, 2), (1e9, 2)]
)
def test_buckets_end_with_their_bound(value, place) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    assert histogram.counts == [int(index == place) for index in range(3)]
    assert (histogram.count, histogram.total) == (1, value)


def test_prometheus_reads_counters_and_gauges() -> None:
    metrics = EngineMetrics(lambda: EngineLoad(2, 3, 25, 100))
    record_request(metrics)
    record_request(metrics, "length").num_preemptions = 2
    metrics.num_rejections = 5
    metrics.num_failed_steps = 1
    types, samples = read(metrics.prometheus_text())
    expected = {
        "mlc_llm_num_requests_running": 2,
        "mlc_llm_num_requests_waiting": 3,
        "mlc_llm_kv_cache_usage_perc": 0.25,
        "mlc_llm_prompt_tokens_total": 40,
        "mlc_llm_generation_tokens_total": 6,
        "mlc_llm_prefix_cache_queries_total": 40,
        "mlc_llm_prefix_cache_hits_total": 32,
        "mlc_llm_num_preemptions_total": 0,  # counted when a request ends, not after
        "mlc_llm_admission_rejections_total": 5,
        "mlc_llm_failed_steps_total": 1,
    }
    assert {name: samples[name, ()] for name in expected} == expected
    for reason, count in {"stop": 1, "length": 1, "abort": 0, "error": 0}.items():
        key = ("mlc_llm_request_success_total", (("finished_reason", reason),))
        assert samples[key] == count
    assert types["mlc_llm_num_requests_running"] == "gauge"
    assert types["mlc_llm_prompt_tokens"] == types["mlc_llm_request_success"] == "counter"


HISTOGRAMS = {
    "time_to_first_token_seconds": (1, 1.5),
    "inter_token_latency_seconds": (2, 0.5),
    "request_time_per_output_token_seconds": (1, 0.25),
    "e2e_request_latency_seconds": (1, 2.25),
    "request_queue_time_seconds": (1, 0.5),
    "request_prefill_time_seconds": (1, 1.0),
    "request_decode_time_seconds": (1, 0.5),
    "request_inference_time_seconds": (1, 1.75),
    "request_prompt_tokens": (1, 20),
    "request_generation_tokens": (1, 3),
    "iteration_tokens_total": (1, 7),
    "step_time_seconds": (1, 0.5),
    "step_time_outside_library_seconds": (1, 0.125),
}


def test_prometheus_reads_histograms() -> None:
    metrics = EngineMetrics()
    record_request(metrics)
    metrics.note_step(0.5, 0.375, 4, 3)
    types, samples = read(metrics.prometheus_text())
    found = {name for name, kind in types.items() if kind == "histogram"}
    assert found == {f"mlc_llm_{name}" for name in HISTOGRAMS}
    for name, (count, total) in HISTOGRAMS.items():
        full = f"mlc_llm_{name}"
        assert samples[f"{full}_count", ()] == count
        assert samples[f"{full}_sum", ()] == total
        assert samples[f"{full}_bucket", (("le", "+Inf"),)] == count
    buckets = [
        (float(labels[0][1]), value)
        for (name, labels), value in samples.items()
        if name == "mlc_llm_time_to_first_token_seconds_bucket"
    ]
    assert buckets == sorted(buckets)
    assert [value for bound, value in buckets if bound < 1.5] == [0] * 10
    assert {value for bound, value in buckets if bound >= 1.5} == {1}


def test_engines_are_told_apart_by_a_label() -> None:
    engines = {"a/b": EngineMetrics(), 'odd "name"\n\\': EngineMetrics()}
    record_request(engines["a/b"])
    _, samples = read(prometheus_text(engines))
    for name, count in (("a/b", 20), ('odd "name"\n\\', 0)):
        labels = (("model_name", name),)
        assert samples["mlc_llm_prompt_tokens_total", labels] == count
        assert samples["mlc_llm_request_prompt_tokens_sum", labels] == count
        key = ("mlc_llm_request_success_total", (("finished_reason", "stop"), *labels))
        assert samples[key] == count / 20


def test_other_collectors_may_stand_beside() -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector({"m": EngineMetrics()}))
    types, _ = read(generate_latest(registry).decode())
    assert len(types) == 3 + 10 + len(HISTOGRAMS)


def test_histograms_can_be_left_out() -> None:
    text = EngineMetrics().prometheus_text(with_histograms=False)
    types, _ = read(text)
    assert set(types.values()) == {"gauge", "counter"} and len(text.splitlines()) < 50


def test_large_counts_are_exact() -> None:
    metrics = EngineMetrics()
    metrics.prompt_tokens = 123_456_789_012
    _, samples = read(metrics.prometheus_text())
    assert samples["mlc_llm_prompt_tokens_total", ()] == 123_456_789_012


def test_the_keys_of_the_original() -> None:
    metrics = EngineMetrics(lambda: EngineLoad(1, 0, 4, 8))
    assert metrics.to_dict()["decode_tokens_per_s"] == 0.0
    assert metrics.to_dict()["last_finished_request"] == {}
    stats = record_request(metrics)
    metrics.note_step(0.5, 0.4, 4, 0)
    metrics.note_step(0.5, 0.4, 6, 2)
    metrics.note_step(0.25, 0.2, 0, 1)
    metrics.note_step(0.5, 0.4, 0, 3)
    metrics.note_step(1.0, 0.4, 0, 3)
    metrics.note_step(1.0, 0.4, 0, 100)
    found = metrics.to_dict()
    assert found["engine_prefill_time_sum"] == 1.0 and found["engine_decode_time_sum"] == 2.75
    assert found["prompt_tokens_sum"] == 20 and found["completion_tokens_sum"] == 3
    assert found["prefill_tokens_sum"] == 10 and found["decode_tokens_sum"] == 109
    assert found["prefill_tokens_per_s"] == 10.0
    assert found["decode_tokens_per_s"] == pytest.approx(107 / 2.75)
    assert found["last_finished_request"] == stats.to_dict()
    assert found["decode_time_by_batch_size"] == {
        "mean": {"batch_size=1": 0.25, "batch_size=3": 0.75, "batch_size=64": 1.0},
        "count": {"batch_size=1": 1, "batch_size=3": 2, "batch_size=64": 1},
    }
    assert found["num_used_pages"] == 4 and found["finished_requests"]["stop"] == 1


def test_recording_is_cheap() -> None:
    """A token and a step cost about a microsecond; the limit leaves room for a busy machine."""
    metrics = EngineMetrics()
    stats = RequestStats(prompt_tokens=4, arrival_s=0.0)
    metrics.note_start(stats, 1.0)
    best = min(_seconds_per_step(metrics, stats) for _ in range(5))
    assert best < 20e-6


def _seconds_per_step(metrics: EngineMetrics, stats: RequestStats, count: int = 2000) -> float:
    start = time.perf_counter()
    for index in range(count):
        metrics.note_token(stats, 2.0 + index)
        metrics.note_step(0.01, 0.009, 0, 4)
    return (time.perf_counter() - start) / count


def test_recording_loads_no_exposition_code() -> None:
    code = (
        "import sys; from mlc_llm.engine.metrics import EngineMetrics, RequestStats; "
        "EngineMetrics().add(RequestStats()); print('prometheus_client' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
