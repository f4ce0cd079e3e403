"""The choice of tokens from a batch of logits, against naive arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner

from mlc_llm.engine.request import TokenLogprobs
from mlc_llm.engine.sampler import Sampled, Sampler, SequenceSampler, token_logprobs
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import StepFailed
from mlc_llm.runtime.runner import SampleRows

VOCAB = 40


@pytest.fixture
def logits() -> np.ndarray:
    return (2 * np.random.default_rng(4).standard_normal(VOCAB)).astype(np.float32)


def make_row(
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    index: int = 0,
    stops: tuple[int, ...] = (),
    **params: Any,
) -> SequenceSampler:
    settings = SamplingParams(**params)
    row = SequenceSampler(settings, prompt or [], index, frozenset(stops), VOCAB)
    for token in generated or []:
        row.append(token)
    return row


def sample(logits: np.ndarray, *rows: SequenceSampler) -> list[Sampled]:
    """Sample rows that all have the same logits."""
    return Sampler(FakeRunner()).sample(np.stack([logits] * len(rows)), rows)


def choose(logits: np.ndarray, *rows: SequenceSampler) -> list[int]:
    """Return the tokens of rows that all have the same logits, none of which may fail."""
    chosen = sample(logits, *rows)
    assert all(choice.error is None for choice in chosen)
    return [choice.token_id for choice in chosen]


def draw(logits: np.ndarray, count: int, **params: Any) -> Counter[int]:
    """Count the tokens that so many sequences of one request begin with."""
    settings = {"seed": 0, **params}
    return Counter(choose(logits, *(make_row(index=index, **settings) for index in range(count))))


def say(
    logits: np.ndarray, row: SequenceSampler, count: int, *others: SequenceSampler
) -> list[int]:
    """Return the next tokens of a row whose logits stay the same; `others` come before it."""
    tokens = []
    for _ in range(count):
        tokens.append(choose(logits, *others, row)[-1])
        row.append(tokens[-1])
    return tokens


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return weights / weights.sum()


def only(probabilities: np.ndarray, kept: np.ndarray) -> np.ndarray:
    expected = np.zeros(VOCAB)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    return expected


def check_frequencies(counts: Counter[int], expected: np.ndarray) -> None:
    """Hold Pearson's chi-square within four standard deviations of what chance brings."""
    total = sum(counts.values())
    found = np.asarray([counts[token] for token in range(len(expected))], np.float64)
    assert found.sum() == total and not found[expected == 0].any()
    is_common = expected * total >= 5  # rarer ones count as one
    wanted = np.append(expected[is_common], expected[~is_common].sum()) * total
    found = np.append(found[is_common], found[~is_common].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = ((found - wanted) ** 2 / wanted).sum()
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom) + 1e-6


def adjusted_naively(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int]
) -> list[float]:
    """Apply bias and penalties one token at a time."""
    out = [float(value) for value in logits]
    for token, bias in dict(params.logit_bias).items():
        out[token] += bias
    for token in set(prompt) | set(generated):
        factor = params.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in set(generated):
        out[token] -= params.presence_penalty
        out[token] -= params.frequency_penalty * generated.count(token)
    return out


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 9e-6}, {"top_p": 0.0}, {"top_p": 1e-9}]
)
def test_greedy_takes_the_likeliest(logits, params) -> None:
    assert draw(logits, 20, **params) == {int(logits.argmax()): 20}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}])
def test_greedy_takes_the_first_of_equals(params) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 9]] = 3
    greedy, drawn = make_row(**params), make_row(seed=1)
    assert choose(logits, greedy) == [7]
    assert choose(logits, greedy, drawn, greedy)[::2] == [7, 7]


def test_greedy_rows_leave_the_runner_alone(logits) -> None:
    class CountingRunner(FakeRunner):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def sample(self, logits: np.ndarray, rows: SampleRows) -> np.ndarray:
            self.sizes.append(len(logits))
            assert len(rows.uniform) == len(logits)
            return super().sample(logits, rows)

    runner = CountingRunner()
    sampler = Sampler(runner)
    greedy, drawn = make_row(temperature=0.0), make_row(temperature=5.0, seed=1)
    [token] = choose(logits, drawn)
    best = int(logits.argmax())
    assert token != best
    for batch in ("gg", "gdg", "dd", "dg", "gd"):
        rows = [greedy if kind == "g" else drawn for kind in batch]
        chosen = sampler.sample(np.stack([logits] * len(rows)), rows)
        expected = [best if kind == "g" else token for kind in batch]
        assert [choice.token_id for choice in chosen] == expected
    assert runner.sizes == [1, 2, 1, 1]


def test_library_time_is_that_of_the_last_call(logits) -> None:
    sampler = Sampler(FakeRunner())
    sampler.sample(logits[None].copy(), [make_row(seed=1)])
    assert sampler.library_s > 0
    sampler.sample(logits[None].copy(), [make_row(temperature=0.0)])
    assert sampler.library_s == 0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_follow_the_softmax(logits, temperature) -> None:
    counts = draw(logits, 20_000, temperature=temperature)
    check_frequencies(counts, softmax(logits, temperature))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_of_that_mass(logits, top_p) -> None:
    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    check_frequencies(draw(logits, 20_000, top_p=top_p), only(probabilities, kept))


@pytest.mark.parametrize("top_k", [1, 3, VOCAB, 1000])
def test_top_k_keeps_so_many(logits, top_k) -> None:
    probabilities = softmax(logits)
    kept = np.argsort(-probabilities)[:top_k]
    check_frequencies(draw(logits, 20_000, top_k=top_k), only(probabilities, kept))


def test_min_p_is_a_share_of_the_likeliest(logits) -> None:
    probabilities = softmax(logits)
    kept = np.flatnonzero(probabilities >= 0.2 * probabilities.max())
    assert 1 < len(kept) < VOCAB
    check_frequencies(draw(logits, 20_000, min_p=0.2), only(probabilities, kept))


def test_seed_decides_whatever_else_is_in_the_batch(logits) -> None:
    def answer(seed: int, *others: SequenceSampler, index: int = 0) -> list[int]:
        return say(logits, make_row(seed=seed, index=index), 30, *others)

    alone = answer(1)
    assert alone == answer(1, make_row(seed=5), make_row(temperature=0.0))
    assert alone == answer(1, make_row(), make_row(top_k=3, presence_penalty=1.0))
    different = [answer(2), answer(-1), answer(1, index=1), answer(2, index=1), answer(2**63 - 1)]
    assert len({tuple(tokens) for tokens in [alone, *different]}) == 6


def test_draws_depend_on_the_place_alone(logits) -> None:
    row = make_row(seed=1)
    # What was computed and thrown away, as before a preemption, leaves no trace.
    assert choose(logits, row) == choose(logits, row) == choose(logits, make_row(seed=1))
    begun = say(logits, row, 10)
    resumed = make_row(generated=begun[:4], seed=1)
    assert say(logits, resumed, 6) == begun[4:]


def test_draws_are_uniform_along_a_sequence_and_across_sequences() -> None:
    row = make_row(seed=7)
    along = []
    for _ in range(8000):
        along.append(row.draw())
        row.append(0)
    across = [make_row(seed=7, index=index).draw() for index in range(8000)]
    seeds = [make_row(seed=seed).draw() for seed in range(8000)]
    for draws in (along, across, seeds):
        assert 0 <= min(draws) and max(draws) < 1
        cells = Counter(int(value * VOCAB) for value in draws)
        check_frequencies(cells, np.full(VOCAB, 1 / VOCAB))
        pairs = Counter(
            int(first * 6) * 6 + int(second * 6)
            for first, second in zip(draws[::2], draws[1::2], strict=True)
        )
        check_frequencies(pairs, np.full(36, 1 / 36))


def test_without_a_seed_draws_differ(logits) -> None:
    assert say(logits, make_row(), 30) != say(logits, make_row(), 30)


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -1.0, "frequency_penalty": 2.0, "repetition_penalty": 1.2},
    {"logit_bias": ((3, 4.5), (7, -100.0)), "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("changes", PENALTIES)
def test_penalties_equal_naive_ones(logits, changes) -> None:
    params = SamplingParams(temperature=0.0, **changes)
    rng = np.random.default_rng(9)
    for _ in range(50):
        prompt = rng.integers(0, VOCAB, 6).tolist()
        generated = rng.integers(0, VOCAB, rng.integers(0, 120)).tolist()
        row = make_row(prompt, generated, temperature=0.0, **changes)
        adjusted = logits.copy()
        row.adjust(adjusted)
        naive = adjusted_naively(logits, params, prompt, generated)
        np.testing.assert_allclose(adjusted, naive, rtol=1e-5, atol=1e-5)
        assert choose(logits, row) == [np.argmax(adjusted)]


def test_penalties_shift_frequencies(logits) -> None:
    changes = {"presence_penalty": 1.0, "frequency_penalty": 0.5}
    counts = draw(logits, 20_000, generated=[3, 3, 5], **changes)
    naive = adjusted_naively(logits, SamplingParams(**changes), [], [3, 3, 5])
    check_frequencies(counts, softmax(np.asarray(naive)))


def test_rows_adjust_themselves_alone(logits) -> None:
    biased = make_row(temperature=0.0, logit_bias={11: 100.0})
    plain = make_row(temperature=0.0)
    best = int(logits.argmax())
    assert choose(logits, plain, biased, plain) == [best, 11, best]


def test_plain_rows_are_not_written_to(logits) -> None:
    batch = np.stack([logits] * 3)
    rows = [make_row(temperature=0.0, logprobs=2), make_row(seed=1), make_row(min_p=0.1, seed=2)]
    Sampler(FakeRunner()).sample(batch, rows)
    np.testing.assert_array_equal(batch, np.stack([logits] * 3))


def test_bias_against_all_but_one_token_leaves_that(logits) -> None:
    bias = {token: -100.0 for token in range(VOCAB) if token != 13}
    assert draw(logits, 50, logit_bias=bias) == {13: 50}


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[2], logits[9] = 50, 40
    row = make_row(temperature=0.0, min_tokens=2, stops=(2, 1000))
    assert say(logits, row, 3) == [9, 9, 2]


def test_no_bias_lifts_a_stop_token_that_waits(logits) -> None:
    settings = {"logit_bias": {2: 100.0, 3: 100.0}, "frequency_penalty": -2.0}
    row = make_row(min_tokens=5, stops=(2,), seed=1, **settings)
    assert say(logits, row, 5) == [3] * 5


def test_a_row_of_nothing_but_waiting_stop_tokens_gives_one_of_them(logits) -> None:
    row = make_row(min_tokens=5, stops=tuple(range(VOCAB)), seed=1)
    assert len(set(say(logits, row, 5))) > 1


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB])
def test_logprobs_are_the_log_softmax(logits, num_top) -> None:
    expected = np.log(softmax(logits))
    found = token_logprobs(logits, 17, num_top)
    assert found.token_id == 17 and found.logprob == pytest.approx(expected[17], abs=1e-6)
    order = np.argsort(-expected)[:num_top]
    assert [token for token, _ in found.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in found.top], expected[order], atol=1e-6)


def test_logprobs_of_named_tokens(logits) -> None:
    expected = np.log(softmax(logits))
    row = make_row(logprobs=0, logprob_token_ids=(9, 2), temperature=0.0)
    [choice] = sample(logits, row)
    assert choice.token_id == int(np.argmax(expected))
    assert [token for token, _ in choice.logprobs.top] == [9, 2]
    told = [value for _, value in choice.logprobs.top]
    np.testing.assert_allclose(told, expected[[9, 2]], atol=1e-6)


@pytest.mark.parametrize("vocab", [20, 255, 256, 257, 6000, 49_152, 151_936])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_likeliest_tokens_of_large_vocabularies(vocab, num_top) -> None:
    rng = np.random.default_rng(vocab + num_top)
    for scale in (0.0, 0.5, 10.0):
        logits = (scale * rng.standard_normal(vocab)).astype(np.float32)
        logits[rng.integers(0, vocab, 30)] = logits.max()  # equals, the lower ids first
        logits[rng.integers(0, vocab, 3)] = -np.inf
        order = np.argsort(-logits, kind="stable")[:num_top]
        token = int(order[-1]) if num_top else 0
        found = token_logprobs(logits, token, num_top)
        assert [token for token, _ in found.top] == order.tolist()
        expected = np.log(softmax(logits).clip(1e-300))
        np.testing.assert_allclose(
            [max(value, -600) for _, value in found.top], expected[order].clip(-600), atol=1e-5
        )


def test_logprobs_have_an_end() -> None:
    logits = np.asarray([0, -np.inf, -1e30, 1], np.float32)
    found = token_logprobs(logits, 1, 20)
    assert found.logprob == -9999.0
    assert [token for token, _ in found.top] == [3, 0, 2, 1]
    assert [value for _, value in found.top][2:] == [-9999.0, -9999.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logprobs_of_a_row_that_is_not_finite(logits, bad) -> None:
    logits[3] = bad
    assert token_logprobs(logits, 5, 4) == TokenLogprobs(5, -9999.0)


@pytest.mark.parametrize("params", [{}, {"logit_bias": {17: 50.0}, "presence_penalty": 1.0}])
def test_logprobs_do_not_know_of_settings(logits, params) -> None:
    row = make_row(generated=[4], logprobs=2, temperature=0.7, seed=3, **params)
    choice = sample(logits, row, make_row())[0]
    assert choice.logprobs == token_logprobs(logits, choice.token_id, 2)


def test_only_rows_that_ask_have_logprobs(logits) -> None:
    chosen = sample(logits, make_row(), make_row(logprobs=0), make_row(logprobs=3))
    assert chosen[0].logprobs is None
    assert [len(choice.logprobs.top) for choice in chosen[1:] if choice.logprobs] == [0, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "logprobs": 3},
        {"repetition_penalty": 1.3, "logit_bias": {4: 3.0}, "min_tokens": 9},
    ],
)
def test_row_without_finite_logits_fails_alone(logits, bad, params) -> None:
    rows = [make_row([5], [6], stops=(2,), seed=1, **params) for _ in range(3)]
    batch = np.stack([logits] * 3)
    batch[1] = bad
    chosen = Sampler(FakeRunner()).sample(batch, rows)
    assert chosen[0].error is None and chosen[0] == chosen[2]
    assert isinstance(chosen[1].error, StepFailed) and chosen[1].logprobs is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_single_nan_is_found(logits, temperature) -> None:
    logits[30] = math.nan
    assert isinstance(sample(logits, make_row(temperature=temperature))[0].error, StepFailed)


def test_tokens_ruled_out_by_the_model_are_never_drawn(logits) -> None:
    logits[::2] = -np.inf
    assert all(token % 2 == 1 for token in draw(logits, 500, temperature=2.0))
