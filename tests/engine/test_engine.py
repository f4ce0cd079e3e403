"""The step loop on the fake runner: every output equals what its request gives alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_engines import (
    Collector,
    ask,
    make_engine,
    prompt_of,
    run,
    runner_of,
)
from fakes import PAGE_SIZE, VOCAB_SIZE, continuation, next_token, only

from mlc_llm.engine.request import Request
from mlc_llm.engine.sampling import SamplingParams


def test_requests_of_all_lengths_say_what_they_say_alone() -> None:
    engine = make_engine()
    lengths = [1, 2, 15, 16, 17, 31, 33, 64, 65, 130, 200]
    said = run(engine, *(ask(f"r{length}", prompt_of(length), 20) for length in lengths))
    for length in lengths:
        assert said.tokens[f"r{length}", 0] == continuation(prompt_of(length), 20)
        assert said.ends[f"r{length}", 0].finish_reason == "length"


def test_generation_goes_on_beside_a_long_prompt() -> None:
    engine = make_engine()
    engine.add(ask("stream", prompt_of(4), 200))
    said = Collector()
    said.take(engine.step())
    engine.add(ask("long", prompt_of(400), 3))
    while ("long", 0) not in said.tokens:
        before = len(said.tokens["stream", 0])
        said.take(engine.step())
        assert len(said.tokens["stream", 0]) == before + 1
    # Pieces of the prompt were small, so that no step took long.
    sizes = runner_of(engine).step_sizes
    assert max(sizes) <= 64 and sum(sizes) >= 404


def test_prompts_and_generation_may_be_kept_apart() -> None:
    engine = make_engine(mixes_prompts=False)
    engine.add(ask("stream", prompt_of(4), 30))
    engine.step()
    said = run(engine, ask("long", prompt_of(200), 5))
    assert said.tokens["long", 0] == continuation(prompt_of(200), 5)
    for step in runner_of(engine).steps:
        counts = np.diff(step.query_start)
        assert (counts == 1).all() or len(counts) == 1


def test_forks_share_the_pages_of_their_prompt() -> None:
    engine = make_engine(max_num_sequence=4)
    prompt = prompt_of(40)
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=20)
    engine.add(Request("r", prompt, params, n=3))
    said = Collector()
    runner = runner_of(engine)
    logits = np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)
    runner.logits_of = lambda tokens: logits[next_token(tokens)]
    said.take(engine.step())
    assert engine.load().num_running == 3 and engine.load().num_used_pages == 3
    said.take(engine.step())
    # The two whole pages are shared, each fork writes to its own copy of the third.
    assert engine.load().num_used_pages == 2 + 3
    while engine.has_work:
        said.take(engine.step())
        engine.check_integrity()
    assert sum(runner.step_sizes) == 40 + 3 * 19
    texts = [said.tokens["r", index] for index in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    # Each says the same without the others.
    for index in range(3):
        alone = make_engine(max_num_sequence=1)
        runner_of(alone).logits_of = runner.logits_of
        assert run(alone, Request("r", prompt, params, n=3)).tokens["r", index] == texts[index]


def test_more_forks_than_places_take_turns() -> None:
    engine = make_engine(max_num_sequence=2)
    said = run(engine, ask("r", prompt_of(40), 5, n=7))
    for index in range(7):
        assert said.tokens["r", index] == continuation(prompt_of(40), 5)
    # Those that waited found the prompt in the cache.
    assert sum(runner_of(engine).step_sizes) < 7 * 40


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_preempted_requests_say_the_same(has_prefix_cache: bool) -> None:
    engine = make_engine(num_pages=12, context_window_size=192, has_prefix_cache=has_prefix_cache)
    requests = [ask(f"r{i}", prompt_of(20, i), 60) for i in range(6)]
    stats = [engine.add(request) for request in requests]
    said = run(engine)
    for i in range(6):
        assert said.tokens[f"r{i}", 0] == continuation(prompt_of(20, i), 60)
    assert sum(s.num_preemptions for s in stats) > 0
    assert stats[0].num_preemptions == 0, "who came first must not give way"
    assert all(s.completion_tokens == 60 for s in stats)


def test_preempted_sampling_continues_its_draws() -> None:
    logits = np.random.default_rng(1).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)

    def say(num_pages: int, count: int) -> Collector:
        engine = make_engine(num_pages=num_pages, context_window_size=128)
        runner_of(engine).logits_of = lambda tokens: logits[next_token(tokens)]
        params = SamplingParams(temperature=1.0, max_tokens=50, repetition_penalty=1.2)
        return run(
            engine,
            *(
                Request(f"r{i}", prompt_of(20, i), params.with_changes(seed=i), n=2)
                for i in range(count)
            ),
        )

    crowded, roomy = say(8, 4), say(64, 4)
    assert crowded.tokens == roomy.tokens
    assert say(64, 1).tokens["r0", 1] == roomy.tokens["r0", 1]


def test_priority_goes_before_arrival() -> None:
    engine = make_engine(max_num_sequence=1)
    said = Collector()
    for name, priority in (("late", 5), ("soon", 0), ("first", -1)):
        engine.add(ask(name, prompt_of(8), 2, priority=priority))
    order: list[str] = []
    while engine.has_work:
        outputs = engine.step()
        said.take(outputs)
        order += [o.request_id for o in outputs if o.finish_reason]
    assert order == ["first", "soon", "late"]


def test_equal_prompts_are_computed_once() -> None:
    engine = make_engine()
    prompt = prompt_of(100)
    run(engine, ask("a", prompt, 4))
    before = sum(runner_of(engine).step_sizes)
    stats = engine.add(ask("b", [*prompt, 9, 9], 4))
    said = run(engine)
    assert said.tokens["b", 0] == continuation([*prompt, 9, 9], 4)
    assert stats.cached_tokens == 96
    assert sum(runner_of(engine).step_sizes) - before == 102 - 96 + 3


def test_answers_are_part_of_the_next_turn() -> None:
    engine = make_engine()
    first = run(engine, ask("a", prompt_of(30), 40)).tokens["a", 0]
    stats = engine.add(ask("b", [*prompt_of(30), *first, 7], 4))
    run(engine)
    assert stats.cached_tokens == (30 + 39) // PAGE_SIZE * PAGE_SIZE


def test_other_salt_or_no_cache_shares_nothing() -> None:
    engine = make_engine()
    run(engine, ask("a", prompt_of(64), 2, cache_salt="x"))
    stats = engine.add(ask("b", prompt_of(64), 2, cache_salt="y"))
    run(engine)
    assert stats.cached_tokens == 0
    engine.reset_prefix_cache()
    engine.check_integrity()
    stats = engine.add(ask("c", prompt_of(64), 2, cache_salt="x"))
    run(engine)
    assert stats.cached_tokens == 0
    plain = make_engine(has_prefix_cache=False)
    run(plain, ask("a", prompt_of(64), 2))
    stats = plain.add(ask("b", prompt_of(64), 2))
    run(plain)
    assert stats.cached_tokens == 0


def test_cache_gives_way_to_requests() -> None:
    engine = make_engine(num_pages=16, context_window_size=256)
    for i in range(10):
        said = run(engine, ask(f"r{i}", prompt_of(100, i), 20))
        assert said.tokens[f"r{i}", 0] == continuation(prompt_of(100, i), 20)


def test_abort_frees_pages_at_once() -> None:
    engine = make_engine(max_num_sequence=2)
    for name in ("a", "b", "waits"):
        engine.add(ask(name, prompt_of(70), 100, n=2))
    engine.step()
    engine.step()
    for name in ("a", "waits", "b", "nobody"):
        engine.abort(name)
        engine.check_integrity()
    assert engine.load().num_used_pages == 0
    outputs = engine.step()
    assert sorted((o.request_id, o.index) for o in outputs) == [
        (name, index) for name in ("a", "b", "waits") for index in (0, 1)
    ]
    assert {o.finish_reason for o in outputs} == {"abort"}
    assert not engine.has_work and engine.step() == []


def test_stop_tokens_end_one_sequence_and_are_not_said() -> None:
    engine = make_engine()
    script = [20, 21, 2, 22, 23]
    runner_of(engine).logits_of = lambda tokens: only(script[len(tokens) - 10])
    stops = frozenset({2})
    said = run(
        engine,
        ask("a", prompt_of(10), 5, stop_token_ids=stops),
        ask("b", prompt_of(10), 5),
    )
    assert said.tokens["a", 0] == [20, 21] and said.tokens["b", 0] == script
    assert said.ends["a", 0].finish_reason == "stop"
    assert said.ends["b", 0].finish_reason == "length"


def test_answer_ends_with_the_context() -> None:
    engine = make_engine(context_window_size=64)
    said = run(engine, ask("a", prompt_of(50), 1000))
    assert said.tokens["a", 0] == continuation(prompt_of(50), 14)
    assert said.ends["a", 0].finish_reason == "length"


def test_prompt_logprobs_are_those_of_each_place() -> None:
    engine = make_engine(max_batch_size=8)
    prompt = prompt_of(30)
    run(engine, ask("warm", prompt, 2))
    said = Collector()
    engine.add(ask("beside", prompt_of(9), 30))
    engine.add(ask("a", prompt, 3, prompt_logprobs=2, n=2))
    found = None
    while engine.has_work:
        outputs = engine.step()
        said.take(outputs)
        for output in outputs:
            if output.prompt_logprobs is not None:
                assert found is None and (output.request_id, output.index) == ("a", 0)
                found = output.prompt_logprobs
    assert said.tokens["a", 1] == continuation(prompt, 3)
    assert found is not None and len(found) == 30 and found[0] is None
    for place, entry in enumerate(found[1:], 1):
        assert entry is not None
        likeliest = next_token(prompt[:place])
        log_sum = np.log(np.exp(50.0) + VOCAB_SIZE - 1)
        assert entry.token_id == prompt[place]
        assert entry.top[0][0] == likeliest
        assert entry.top[0][1] == pytest.approx(50 - log_sum, abs=1e-5)
        assert entry.logprob == pytest.approx(
            (50 if likeliest == prompt[place] else 0) - log_sum, rel=1e-5, abs=1e-5
        )


@pytest.mark.parametrize("seed", range(6))
def test_random_load_keeps_every_promise(seed: int) -> None:
    """Arrivals, forks, aborts, salts, failures and shortage of pages, in random order."""
    rng = random.Random(seed)
    engine = make_engine(
        num_pages=rng.choice([14, 40]),
        context_window_size=200,
        max_num_sequence=rng.choice([2, 5, 8]),
        has_prefix_cache=rng.random() < 0.8,
        max_idle_pages=rng.choice([None, 4]),
        mixes_prompts=rng.random() < 0.7,
    )
    said, asked, aborted = Collector(), {}, set()
    bases = [prompt_of(100, i) for i in range(3)]
    for number in range(500):
        if rng.random() < 0.25 and number < 400:
            base = rng.choice(bases)
            prompt = base[: rng.randint(1, 100)] + [rng.randrange(3, 9)] * rng.randint(0, 9)
            request = ask(
                f"r{number}",
                prompt,
                rng.randint(1, 40),
                n=rng.choice([1, 1, 1, 2, 3]),
                priority=rng.choice([0, 0, 1]),
                cache_salt=rng.choice(["", "", "s"]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
            )
            asked[request.request_id] = request
            engine.add(request)
        if rng.random() < 0.04 and asked:
            name = rng.choice(sorted(asked))
            aborted.add(name)
            engine.abort(name)
        if rng.random() < 0.01:
            runner_of(engine).error = RuntimeError("broken")
        said.take(engine.step())
        engine.check_integrity()
    runner_of(engine).error = None
    while engine.has_work:
        said.take(engine.step())
        engine.check_integrity()
    assert engine.load().num_used_pages == 0
    num_whole = 0
    for name, request in asked.items():
        for index in range(request.n):
            end = said.ends[name, index]
            expected = continuation(list(request.prompt), request.params.max_tokens or 0)
            tokens = said.tokens[name, index]
            if end.finish_reason == "length":
                num_whole += 1
                assert tokens == expected
            else:
                assert end.finish_reason == "error" or name in aborted
                assert tokens == expected[: len(tokens)]
    assert num_whole > 50
