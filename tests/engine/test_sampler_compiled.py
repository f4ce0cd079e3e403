"""Batches drawn by the compiled kernel: settings of rows, seeds and bad rows beside good ones."""

from __future__ import annotations

import ctypes
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner
from numpy.typing import NDArray

from mlc_llm.engine.grammar_cache import CompiledGrammar
from mlc_llm.engine.grammar_masks import SequenceGrammar
from mlc_llm.engine.sampler import Sampler, SequenceSampler
from mlc_llm.engine.sampling import SamplingParams
from mlc_llm.errors import StepFailed
from mlc_llm.runtime.memory import aligned_zeros, as_aligned, as_tensor
from mlc_llm.runtime.runner import SampleRows

pytestmark = pytest.mark.cpu

VOCAB = 1003


class KernelRunner(FakeRunner):
    """A fake runner that samples with the compiled kernel."""

    def __init__(self) -> None:
        import tvm

        from mlc_llm.compiler.target import describe_target
        from mlc_llm.kernels.cpu.sampling import sample

        super().__init__()
        target = tvm.target.Target(describe_target("cpu", "O2")["target"])
        module = tvm.IRModule({"f": sample().with_attr("global_symbol", "f")})
        self._function = tvm.compile(module, target=target)["f"]

    def sample(self, logits: NDArray[np.float32], rows: SampleRows) -> NDArray[np.int32]:
        tokens = aligned_zeros((len(logits),), np.int32)
        settings = (rows.temperature, rows.top_p, rows.min_p, rows.top_k, rows.uniform)
        inputs = [as_tensor(as_aligned(array)) for array in (logits, *settings)]
        self._function(*inputs, as_tensor(tokens))
        return tokens


@pytest.fixture(scope="module")
def runner() -> KernelRunner:
    return KernelRunner()


@pytest.fixture
def logits() -> np.ndarray:
    return (2 * np.random.default_rng(8).standard_normal(VOCAB)).astype(np.float32)


def make_row(index: int = 0, **params: Any) -> SequenceSampler:
    return SequenceSampler(SamplingParams(**params), [1], index, frozenset([2]), VOCAB)


def choose(runner: KernelRunner, logits: np.ndarray, *rows: SequenceSampler) -> list[int]:
    chosen = Sampler(runner).sample(np.stack([logits] * len(rows)), rows)
    assert all(choice.error is None for choice in chosen)
    return [choice.token_id for choice in chosen]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_p": 0.7},
    {"top_k": 30},
    {"min_p": 0.05},
    {"top_k": 10**6, "top_p": 0.999},
    {"temperature": 1.5, "top_k": 200, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_frequencies_of_a_batch(runner, logits, settings) -> None:
    params = SamplingParams(**settings)
    weights = np.exp((logits - logits.max()).astype(np.float64) / params.temperature)
    order = np.argsort(-weights)
    kept = weights >= params.min_p
    if params.top_k:
        kept &= weights >= weights[order[min(params.top_k, VOCAB) - 1]]
    sums = np.cumsum((weights * kept)[order])
    kept &= weights >= weights[order[int(np.searchsorted(sums, params.top_p * sums[-1]))]]
    expected = weights * kept / weights[kept].sum()
    count = 10_000
    rows = [make_row(index, seed=3, **settings) for index in range(count)]
    counts = Counter(choose(runner, logits, *rows))
    found = np.asarray([counts[token] for token in range(VOCAB)])
    assert not found[~kept].any()
    # Pearson's chi-square over the tokens that are common enough for it, the others as one.
    common = expected * count >= 5
    wanted = np.append(expected[common], expected[~common].sum()) * count
    found = np.append(found[common], found[~common].sum())
    found, wanted = found[wanted > 1e-9], wanted[wanted > 1e-9]
    freedom = len(wanted) - 1
    assert ((found - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_draws_the_same_in_any_place_of_any_batch(runner, logits) -> None:
    rows = [
        make_row(index, seed=index % 3, **settings)
        for index, settings in enumerate([*SETTINGS, {"temperature": 0.0}, {"top_k": 1}])
    ]
    alone = [choose(runner, logits, row)[0] for row in rows]
    assert choose(runner, logits, *rows) == alone
    assert choose(runner, logits, *rows[::-1]) == alone[::-1]
    assert choose(runner, logits, *rows[2:5]) == alone[2:5]
    assert alone[-2:] == [logits.argmax()] * 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_fails_alone(runner, logits, bad) -> None:
    rows = [make_row(index, seed=1) for index in range(4)]
    batch = np.stack([logits] * 4)
    batch[2] = bad
    chosen = Sampler(runner).sample(batch, rows)
    assert isinstance(chosen[2].error, StepFailed)
    sound = [choice.token_id for place, choice in enumerate(chosen) if place != 2]
    assert sound == choose(runner, logits, rows[0], rows[1], rows[3])


def test_what_is_held_back_is_never_drawn(runner, logits) -> None:
    logits[2], logits[[5, 6]] = 30, -np.inf
    rows = [make_row(index, seed=1, min_tokens=1, temperature=50.0) for index in range(3000)]
    assert not {2, 5, 6} & set(choose(runner, logits, *rows))


def test_top_p_of_nothing_takes_the_likeliest(runner, logits) -> None:
    rows = [make_row(index, seed=1, top_p=top_p) for index in range(20) for top_p in (0, 1e-60)]
    assert set(choose(runner, logits, *rows)) == {int(logits.argmax())}


def test_no_draw_takes_what_a_grammar_forbids(runner: KernelRunner) -> None:
    """However likely the rest, and whatever the settings: 2,000 draws from three tokens of many."""
    vocabulary = SimpleNamespace(end_id=VOCAB, size=VOCAB + 1, is_special=lambda token: False)
    allowed = [5, 500, VOCAB - 1]
    rng = np.random.default_rng(1)
    seen: Counter[int] = Counter()
    for number in range(100):
        settings = {
            "temperature": float(rng.choice([0.01, 1.0, 100.0])),
            "top_p": float(rng.choice([0.05, 0.9, 1.0])),
            "top_k": int(rng.choice([0, 2, 40])),
            "min_p": float(rng.choice([0.0, 0.5])),
        }
        rows = [make_row(index, seed=number, **settings) for index in range(20)]
        for row in rows:
            row.grammar = SequenceGrammar(
                CompiledGrammar(OnlyThese(allowed), vocabulary, (), None), [2], np.float32(-1e30)
            )
        logits = (30 * rng.standard_normal((20, VOCAB))).astype(np.float32)
        logits[:, allowed] -= 60
        seen.update(sampled.token_id for sampled in Sampler(runner).sample(logits, rows))
    assert set(seen) == set(allowed) and seen.total() == 2000


class OnlyThese:
    """A matcher that allows some tokens, and no end."""

    def __init__(self, allowed: list[int]) -> None:
        bits = np.zeros(-(-VOCAB // 32) * 32 + 32, np.uint8)
        bits[allowed] = 1
        self._words = np.packbits(bits, bitorder="little")

    def deep_copy(self) -> OnlyThese:
        return self

    def is_error(self) -> bool:
        return False

    def unsafe_compute_mask_ptr(self, pointer: int, num_bytes: int) -> None:
        ctypes.memmove(pointer, self._words.ctypes.data, num_bytes)
