"""Loads: how many requests run at once and when, and what is made of their records."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from mlc_llm.bench.load.ask import Asker, Record, Sample
from mlc_llm.bench.load.drive import Bounds, Load, Run, run_load
from mlc_llm.bench.load.http import Server
from mlc_llm.bench.load.measure import Questions, Target, run_measure
from mlc_llm.bench.load.plot import draw, points
from mlc_llm.bench.load.prompts import Exchange, Lengths
from mlc_llm.bench.load.results import LATENCY_HEADER, RATES_HEADER, Figures, Result
from mlc_llm.errors import OptionError, RequestError

from .fake_openai import FakeOpenAI


def drive(fake: FakeOpenAI, load: Load, samples: int | None = None) -> Run:
    asker = Asker(Server.parse(fake.url), "completions", "fake", 10.0)
    source = itertools.repeat(Sample("x", 2), *(() if samples is None else (samples,)))
    return asyncio.run(run_load(asker, source, load, seed=0))


def test_clients_ask_one_request_after_another() -> None:
    with FakeOpenAI(event_delay_s=0.01) as fake:
        run = drive(fake, Load(3, None, Bounds(10, None)))
    assert len(run.records) == len(fake.bodies) == 10
    assert fake.most_running == 3
    assert run.wall_s >= 4 * 2 * 0.01
    assert 0 < run.client_cpu < 1


def test_warm_up_requests_do_not_count() -> None:
    with FakeOpenAI(event_delay_s=0.01) as fake:
        run = drive(fake, Load(1, None, Bounds(2, None), warmup=3))
    assert len(fake.bodies) == 5 and len(run.records) == 2
    assert fake.most_running == 1


def test_a_duration_ends_the_sending() -> None:
    with FakeOpenAI(event_delay_s=0.01) as fake:
        run = drive(fake, Load(2, None, Bounds(None, 0.2)))
    assert 4 <= len(run.records) <= 20
    assert 0.2 <= run.wall_s < 1


def test_a_load_ends_with_its_samples() -> None:
    with FakeOpenAI() as fake:
        assert len(drive(fake, Load(2, None, Bounds(9, None)), samples=3).records) == 3
        assert len(drive(fake, Load(None, 100.0, Bounds(9, None)), samples=3).records) == 3


def test_arrivals_wait_for_nobody() -> None:
    with FakeOpenAI(event_delay_s=0.15) as fake:
        run = drive(fake, Load(None, 100.0, Bounds(20, None)))
    assert fake.most_running > 5
    sent = [record.sent_s for record in run.records]
    assert sent == sorted(sent)
    gaps = [later - earlier for earlier, later in itertools.pairwise(sent)]
    assert 0.004 < sum(gaps) / len(gaps) < 0.03
    assert max(gaps) > 2 * min(gaps)


def test_arrivals_end_with_their_duration() -> None:
    with FakeOpenAI() as fake:
        run = drive(fake, Load(None, 100.0, Bounds(None, 0.2), warmup=1))
    assert 8 <= len(run.records) <= 40


def test_a_load_is_one_of_two_kinds() -> None:
    with FakeOpenAI() as fake, pytest.raises(ValueError):
        drive(fake, Load(None, None, Bounds(1, None)))


def make_result(**changes: Any) -> Result:
    """Return the result of two answered requests and the given one."""
    records = [
        Record(0.0, 1.0, [0.5, 0.75, 1.0], "", 100, 0, 3, True),
        Record(0.0, 2.0, [1.0, 1.5, 2.0], "", 200, 0, 3, True),
    ]
    if changes:
        records.append(Record(**{"sent_s": 0.0, "end_s": 4.0, "is_counted": True, **changes}))
    return Result(Load(4, None, Bounds(3, None)), Run(records, 2.0, 0.1))


def test_figures_are_those_of_answered_requests() -> None:
    data = make_result(error="timeout", output_tokens=1000).to_json()
    assert data["requests"] == 3 and data["answered"] == 2
    assert data["errors"] == {"timeout": 1}
    assert data["output_tokens"] == 6 and data["prompt_tokens"] == 300
    assert data["output_tokens_per_s"] == 3.0
    assert data["total_tokens_per_s"] == 153.0
    assert data["requests_per_s"] == 1.0
    assert data["ttft_s"]["mean"] == 0.75
    assert data["tpot_s"]["mean"] == 0.375
    assert data["itl_s"] == {"mean": 0.375, "p50": 0.375, "p90": 0.5, "p99": 0.5}
    assert data["latency_s"]["p50"] == 1.5


def test_percentiles() -> None:
    assert Figures.of([float(n) for n in range(101)]) == Figures(50.0, 50.0, 90.0, 99.0)
    assert Figures.of([]) is None


def test_rows_fit_their_headers() -> None:
    result = make_result()
    assert len(result.rates_row()) == len(RATES_HEADER)
    rows = result.latency_rows()
    assert {len(row) for row in rows} == {len(LATENCY_HEADER)}
    assert rows[0] == ("4 clients", "first token", "750.0", "750.0", "950.0", "995.0")
    failed = Result(Load(None, 0.5, Bounds(1, None)), Run([Record(0.0, error="timeout")], 1.0, 0))
    assert failed.latency_rows()[0] == ("0.5 requests/s", "first token", "", "", "", "")
    assert failed.rates_row()[1:4] == ("1", "1", "0.00")


def test_notes_say_what_to_be_careful_about() -> None:
    assert make_result().notes == []
    [note] = make_result(error="HTTP 429", detail="full").notes
    assert note == "4 clients: 1 failed with HTTP 429: full"
    [note] = make_result(is_counted=False).notes
    assert "no usage" in note
    [note] = make_result(prompt_tokens=900, cached_tokens=900).notes
    assert "change --seed" in note
    busy = make_result()
    [note] = Result(busy.load, Run(busy.run.records, 2.0, 0.9)).notes
    assert "used 90% of a core" in note


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    results = [make_result(), Result(Load(1, None, Bounds(1, None)), Run([], 1.0, 0))]
    assert points(results) == [(375.0, 3.0, "4 clients")]
    for chosen in (results, results[1:]):
        draw("title", chosen, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def measure(fake: FakeOpenAI, questions: Questions, **changes: Any) -> tuple[list[Result], str]:
    """Run two loads; return their results and what was announced."""
    said: list[str] = []
    loads = [Load(1, None, Bounds(2, None), warmup=1), Load(2, None, Bounds(4, None))]
    target = Target(Server.parse(fake.url), **changes)
    return run_measure(target, questions, loads, said.append), "\n".join(said)


def test_a_whole_measurement_with_made_up_prompts() -> None:
    with FakeOpenAI() as fake:
        results, said = measure(fake, Questions(Lengths(50, 5)))
    assert [result.num_answered for result in results] == [2, 4]
    assert said == "measuring 1 client ...\nmeasuring 2 clients ..."
    for record in itertools.chain(*(result.run.records for result in results)):
        assert (record.prompt_tokens, record.output_tokens) == (50, 5)
    asked = fake.bodies[-7:]
    assert {body["model"] for body in asked} == {"fake"}
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in asked)
    assert len({body["messages"][0]["content"] for body in asked}) == 7


def test_a_whole_measurement_with_dialogues() -> None:
    exchanges = [Exchange("q " * n, "a " * n) for n in range(1, 9)]
    with FakeOpenAI(tokenize="prompt", knows_ignore_eos=False) as fake:
        results, said = measure(fake, Questions(exchanges=exchanges), endpoint="completions")
    assert "no ignore_eos; answers may be shorter" in said
    records = [record for result in results for record in result.run.records]
    assert len(records) == 6
    assert all(record.prompt_tokens == record.output_tokens for record in records)
    assert len({record.prompt_tokens for record in records}) == 6


def test_few_dialogues_are_asked_again() -> None:
    with FakeOpenAI(tokenize="prompt") as fake:
        results, _ = measure(fake, Questions(exchanges=[Exchange("q", "a")]), ignore_eos=False)
    assert sum(result.num_answered for result in results) == 6
    assert not any("ignore_eos" in body for body in fake.bodies)


def test_a_server_that_cannot_be_measured_is_named() -> None:
    questions = Questions(Lengths(50, 5))
    with FakeOpenAI(api_key="sesame") as fake:
        with pytest.raises(RequestError, match=f"{fake.url} cannot be measured: HTTP 401"):
            measure(fake, questions)
    with FakeOpenAI(status=503) as fake:
        with pytest.raises(RequestError, match="HTTP 503: refused"):
            measure(fake, questions)
        with pytest.raises(OptionError, match="no dialogue"):
            exchanges = [Exchange("q" * 999, "a")]
            measure(fake, Questions(exchanges=exchanges, max_total_len=9), ignore_eos=False)
        with pytest.raises(RequestError, match="answered no request; 1 client: 2 failed with"):
            measure(fake, Questions(exchanges=exchanges), ignore_eos=False, model="x")
