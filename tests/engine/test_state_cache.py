"""Recurrent state beside pages: who has which slot, and answers that snapshots do not change."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes import NO_KV, PAGE_SIZE, STATES, VOCAB_SIZE, FakeRunner, continuation

from mlc_llm.artifact import KVCacheLayout
from mlc_llm.engine.engine import Engine
from mlc_llm.engine.request import Output, Request
from mlc_llm.engine.sampling import SamplingParams

# A recurrent model has no KV cache; a hybrid one has both, and its fake compares them.
HYBRID = KVCacheLayout(1, 1, 2, PAGE_SIZE, "float16")
KINDS = {"recurrent": NO_KV, "hybrid": HYBRID}


def make_engine(
    kind: str, num_snapshots: int = 8, num_sequences: int = 4, num_pages: int = 128, **options: Any
) -> Engine:
    runner = FakeRunner(
        num_pages=num_pages,
        num_state_slots=num_sequences + num_snapshots,
        context_window_size=512,
        prefill_chunk_size=64,
        max_batch_size=num_sequences,
        kv_cache=KINDS[kind],
        states=STATES,
    )
    return Engine(runner, **options)


def runner_of(engine: Engine) -> FakeRunner:
    runner = engine._runner
    assert isinstance(runner, FakeRunner)
    return runner


def ask(name: str, prompt: list[int], count: int = 8, **changes: Any) -> Request:
    return Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=count), **changes)


def run(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[int]]:
    """Run requests to their end; return the tokens of each sequence."""
    said: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        collect(engine.step(), said)
        engine.check_integrity()
    return said


def collect(outputs: list[Output], said: dict[tuple[str, int], list[int]]) -> None:
    for output in outputs:
        assert output.error is None
        if output.token_id is not None:
            said.setdefault((output.request_id, output.index), []).append(output.token_id)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def num_computed(engine: Engine) -> int:
    return sum(runner_of(engine).step_sizes)


def test_answers_of_all_lengths_are_those_alone(kind: str) -> None:
    engine = make_engine(kind)
    lengths = [1, 2, 15, 16, 17, 31, 33, 64, 65, 130, 200]
    said = run(engine, *(ask(f"r{length}", prompt_of(length), 40) for length in lengths))
    for length in lengths:
        assert said[f"r{length}", 0] == continuation(prompt_of(length), 40)


def test_next_turn_goes_on_from_the_newest_boundary(kind: str) -> None:
    engine = make_engine(kind)
    first = prompt_of(100)
    answer = run(engine, ask("first", first, 60))["first", 0]
    before = num_computed(engine)
    second = [*first, *answer, *prompt_of(20, seed=1)]
    request = ask("second", second)
    stats = engine.add(request)
    assert run(engine)["second", 0] == continuation(second)
    # Of the 159 tokens whose state there was, whole pages are kept.
    assert stats.cached_tokens == 144
    assert num_computed(engine) - before == len(second) - 144 + 7


def test_same_prompt_again_computes_the_last_page_only(kind: str) -> None:
    engine = make_engine(kind)
    prompt = prompt_of(70)
    run(engine, ask("first", prompt, 1))
    stats = engine.add(ask("again", prompt))
    assert run(engine)["again", 0] == continuation(prompt)
    assert stats.cached_tokens == 64


def test_prompts_that_part_leave_a_snapshot_where_they_do(kind: str) -> None:
    engine = make_engine(kind)
    system = prompt_of(48)
    prompts = [[*system, *prompt_of(30, seed)] for seed in (1, 2, 3)]
    cached = []
    for index, prompt in enumerate(prompts):
        stats = engine.add(ask(f"r{index}", prompt))
        assert run(engine)[f"r{index}", 0] == continuation(prompt)
        cached.append(stats.cached_tokens)
    # The second shows where others part, the third begins there.
    assert cached == [0, 0, 48]


def test_growing_answer_needs_one_snapshot(kind: str) -> None:
    engine = make_engine(kind)
    prompt = prompt_of(40)
    answer = run(engine, ask("long", prompt, 200))["long", 0]
    states = engine._state_cache
    assert states is not None and states.num_snapshots == 2
    stats = engine.add(ask("other end", [*prompt, 5, 6, 7]))
    run(engine)
    assert stats.cached_tokens == 32
    stats = engine.add(ask("next", [*prompt, *answer, 5]))
    run(engine)
    assert stats.cached_tokens == 224


def test_oldest_use_is_replaced_first(kind: str) -> None:
    engine = make_engine(kind, num_snapshots=2)
    first, second, third = (prompt_of(40, seed) for seed in (1, 2, 3))
    for name, prompt in (("a", first), ("b", second), ("a2", first), ("c", third)):
        run(engine, ask(name, prompt, 1))
    cached = []
    for name, prompt in (("c2", third), ("a3", first), ("b2", second)):
        stats = engine.add(ask(name, prompt, 1))
        run(engine)
        cached.append(stats.cached_tokens)
    assert cached == [32, 32, 0]


def test_forks_have_states_of_their_own(kind: str) -> None:
    engine = make_engine(kind)
    prompt = prompt_of(37)
    params = SamplingParams(temperature=1.0, max_tokens=30, seed=5)
    said = run(engine, Request("many", prompt, params, n=7))
    for index in range(7):  # more than run at once: the rest start from a snapshot
        assert said["many", index] == continuation(prompt, 30)


@pytest.mark.parametrize("options", [{"has_prefix_cache": False}, {"num_snapshots": 0}])
def test_nothing_is_kept_where_nothing_may_be(kind: str, options: dict[str, Any]) -> None:
    engine = make_engine(kind, **options)
    prompt = prompt_of(70)
    for name in ("first", "again"):
        stats = engine.add(ask(name, prompt))
        assert run(engine)[name, 0] == continuation(prompt)
        assert stats.cached_tokens == 0
    # No step ends early for a snapshot that is not taken.
    assert runner_of(engine).step_sizes[:2] == [64, 6]


def test_preempted_sequences_go_on(kind: str) -> None:
    engine = make_engine(kind, num_pages=12)
    prompts = {f"r{seed}": prompt_of(60, seed) for seed in range(3)}
    said = run(engine, *(ask(name, prompt, 60) for name, prompt in prompts.items()))
    for name, prompt in prompts.items():
        assert said[name, 0] == continuation(prompt, 60)
    assert engine.metrics.to_dict()  # recording went on


def test_reset_forgets_snapshots(kind: str) -> None:
    engine = make_engine(kind)
    prompt = prompt_of(70)
    run(engine, ask("first", prompt))
    engine.reset_prefix_cache()
    engine.check_integrity()
    assert engine._state_cache is not None and engine._state_cache.num_snapshots == 0
    stats = engine.add(ask("again", prompt))
    assert run(engine)["again", 0] == continuation(prompt)
    assert stats.cached_tokens == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_chats_equal_those_without_snapshots(kind: str, seed: int) -> None:
    """Turns that share beginnings, aborts, forks, few pages and slots: same answers throughout."""
    rng = random.Random(seed)
    engine = make_engine(
        kind,
        num_snapshots=rng.choice([1, 3, 8]),
        num_pages=rng.choice([24, 40, 128]),
        max_idle_pages=rng.choice([None, 0, 8]),
        mixes_prompts=rng.random() < 0.5,
    )
    chats = [prompt_of(rng.randrange(1, 60), s) for s in range(4)]
    chats += [[*chats[0], *prompt_of(9, 77)], list(chats[1])]
    asked: dict[str, tuple[list[int], int]] = {}
    aborted: set[str] = set()
    said: dict[tuple[str, int], list[int]] = {}
    for number in range(60):
        if rng.random() < 0.4:
            chat = rng.randrange(len(chats))
            name, count = f"r{number}", rng.randrange(1, 40)
            if len(chats[chat]) + count < 200:
                asked[name] = (list(chats[chat]), count)
                engine.add(ask(name, chats[chat], count, n=rng.choice([1, 1, 3])))
                answer = continuation(chats[chat], count)
                chats[chat] += [*answer[: rng.randrange(count + 1)], *prompt_of(5, number)]
        if asked and rng.random() < 0.1:
            aborted.add(name := rng.choice(list(asked)))
            engine.abort(name)
        if rng.random() < 0.03:
            engine.reset_prefix_cache()
        for _ in range(rng.randrange(6)):
            collect(engine.step(), said)
            engine.check_integrity()
    while engine.has_work:
        collect(engine.step(), said)
        engine.check_integrity()
    assert len(asked) > 10
    for (name, _), tokens in said.items():
        prompt, count = asked[name]
        expected = continuation(prompt, count)
        assert tokens == (expected[: len(tokens)] if name in aborted else expected)
