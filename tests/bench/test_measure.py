"""Timing on a clock that the test moves, and the arithmetic of the figures."""

from __future__ import annotations

import pytest

from mlc_llm.bench.measure import measure
from mlc_llm.bench.workloads import Workload

from .fakes import FakeRunner, make_decode, make_prefill


def test_only_the_runs_after_warm_up_count() -> None:
    runner = FakeRunner([9, 9, 1, 2, 3, 4, 5, 6])
    bandwidths = iter([10.0, 20.0, 30.0, 40.0])
    counted: list[int] = []
    found = measure(
        runner,
        Workload("decode", 2, 4, 8),
        repeats=3,
        warmup=1,
        seed=0,
        read_bandwidth=lambda: next(bandwidths),
        count=counted.append,
        clock=runner.clock,
    )
    assert len(runner.steps) == 8
    assert found.runs == (3, 7, 11)
    assert found.bandwidths == (10, 20, 30, 40)
    assert counted == [1, 1, 1, 1]
    assert found.rates == pytest.approx([8 / 3, 8 / 7, 8 / 11])
    assert found.tokens_per_s == pytest.approx(8 / 7)
    assert found.ms_per_token == pytest.approx(3500)


def test_every_repeat_runs_the_same_steps() -> None:
    runner = FakeRunner()
    measure(
        runner,
        Workload("prefill", 30),
        repeats=2,
        warmup=0,
        seed=3,
        read_bandwidth=lambda: 1.0,
        clock=iter(range(10)).__next__,
    )
    assert [len(step.token_ids) for step in runner.steps] == [24, 6, 24, 6]
    assert runner.steps[0] is runner.steps[2]


def test_time_for_the_bandwidth_is_not_counted() -> None:
    runner = FakeRunner([1.0])

    def read_bandwidth() -> float:
        runner.clock.now += 100
        return 5.0

    found = measure(
        runner,
        Workload("decode", 3),
        repeats=2,
        warmup=1,
        seed=0,
        read_bandwidth=read_bandwidth,
        clock=runner.clock,
    )
    assert found.runs == (3, 3)


def test_a_decode_reads_the_weights_once_a_step_whatever_the_batch() -> None:
    assert make_decode().tokens_per_s == 5
    assert make_decode(batch=4).tokens_per_s == 20
    for batch in (1, 4):
        found = make_decode(batch)
        assert found.ms_per_token == 200
        assert found.read_gb_s(2_000_000_000) == 10
        assert found.bandwidth_gb_s == 20


def test_a_prefill_has_no_rate_of_reading() -> None:
    assert make_prefill().read_gb_s(10**9) is None
    assert make_prefill().tokens_per_s == 75
