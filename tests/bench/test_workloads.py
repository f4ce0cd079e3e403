"""What is run: the plan, its limits, and that its steps describe whole sequences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlc_llm.artifact import TensorSpec
from mlc_llm.bench.workloads import (
    Workload,
    check_workloads,
    make_steps,
    num_pages_of,
    num_state_slots_of,
    plan_workloads,
)
from mlc_llm.errors import OptionError

from .fakes import METADATA

PAGE_SIZE = METADATA.kv_cache.page_size
MANY = [
    Workload("prefill", 70),
    Workload("prefill", 24),
    Workload("prefill", 5),
    Workload("decode", 20, 3, 30),
    Workload("decode", 1, 1, 0),
    Workload("decode", 33, 2, 16),
]


def test_the_plan_has_each_length_and_each_batch_at_each_context() -> None:
    assert plan_workloads([512, 64], 8, [1, 4], [32, 100]) == [
        Workload("prefill", 512),
        Workload("prefill", 64),
        Workload("decode", 8, 1, 32),
        Workload("decode", 8, 4, 32),
        Workload("decode", 8, 1, 100),
        Workload("decode", 8, 4, 100),
    ]


def test_zero_leaves_a_kind_out() -> None:
    assert plan_workloads([0], 8, [2], [0]) == [Workload("decode", 8, 2, 0)]
    assert plan_workloads([7], 0, [2], [0]) == [Workload("prefill", 7)]
    with pytest.raises(OptionError, match="leave nothing to measure"):
        plan_workloads([0], 0, [1], [1])


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (Workload("prefill", 101), "window of 100; .* --overrides context_window_size=101"),
        (Workload("decode", 10, 1, 91), "101 tokens do not fit"),
        (Workload("decode", 1, 9, 1), "at most 8 sequences .* --overrides max_batch_size=9"),
        (Workload("decode", 10, 8, 80), r"KV cache takes 0.0 GB, this machine has 0.0 GB"),
    ],
)
def test_what_a_library_does_not_allow_is_refused(workload: Workload, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_workloads([workload], METADATA, 10_000)


def test_the_limits_themselves_are_allowed() -> None:
    limits = [Workload("prefill", 100), Workload("decode", 10, 8, 90)]
    check_workloads(limits, METADATA, None)
    kv_bytes = 8 * 100 * METADATA.kv_cache.bytes_per_token
    check_workloads(limits, METADATA, kv_bytes)
    with pytest.raises(OptionError):
        check_workloads(limits, METADATA, kv_bytes - 1)


@pytest.mark.parametrize("workload", MANY, ids=str)
def test_steps_bring_every_token_to_its_place(workload: Workload) -> None:
    steps = make_steps(workload, METADATA, seed=0)
    end = workload.context
    owner: dict[int, int] = {}
    for step in steps:
        count = len(step.token_ids) // workload.batch
        assert count <= METADATA.prefill_chunk_size
        assert step.query_start.tolist() == [i * count for i in range(workload.batch + 1)]
        assert step.logit_rows.tolist() == [(i + 1) * count - 1 for i in range(workload.batch)]
        assert step.context_len.tolist() == [end + count] * workload.batch
        assert step.page_table.shape == (workload.batch, -(-(end + count) // PAGE_SIZE))
        for sequence in range(workload.batch):
            rows = slice(sequence * count, (sequence + 1) * count)
            positions, slots = step.positions[rows], step.slots[rows]
            assert positions.tolist() == list(range(end, end + count))
            pages = step.page_table[sequence]
            assert (
                slots == pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            ).all()
            for page in pages.tolist():
                assert owner.setdefault(page, sequence) == sequence
        assert step.state_slots is None and step.image_rows is None and step.image_embeds is None
        for name, array in vars(step).items():
            if array is None:
                continue
            assert array.dtype == np.int32 and array.flags.c_contiguous, name
        end += count
    assert end == workload.context + workload.tokens
    assert len(steps) == (workload.tokens if workload.name == "decode" else -(-end // 24))
    assert max(owner) + 1 == num_pages_of([workload], PAGE_SIZE)


def test_sequences_of_recurrent_models_have_slots() -> None:
    metadata = dataclasses.replace(METADATA, states=[TensorSpec("state", (1,), "float32")])
    workloads = [Workload("decode", 2, 4, 0), Workload("prefill", 20)]
    steps = make_steps(workloads[0], metadata, seed=0)
    slots = [step.state_slots.tolist() for step in steps if step.state_slots is not None]
    assert slots == [[0, 1, 2, 3]] * 2
    assert num_state_slots_of(workloads) == 4


def test_tokens_are_in_the_vocabulary_and_come_from_the_seed() -> None:
    workload = Workload("decode", 20, 4, 0)

    def tokens(seed: int) -> list[list[int]]:
        return [step.token_ids.tolist() for step in make_steps(workload, METADATA, seed)]

    assert tokens(1) == tokens(1) != tokens(2)
    drawn = np.array(tokens(1))
    assert drawn.min() >= 0 and drawn.max() < METADATA.vocab_size
    assert len(np.unique(drawn)) > 20


def test_pages_are_enough_for_the_largest() -> None:
    assert num_pages_of([Workload("prefill", 17), Workload("decode", 1, 3, 16)], 16) == 6
