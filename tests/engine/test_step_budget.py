"""How large pieces of prompts become, given what steps have cost."""

from __future__ import annotations

import itertools

import pytest

from mlc_llm.engine.step_budget import MAX_PROMPT_STEP_S, MAX_SLOWDOWN, MIN_PIECE, StepBudget


def run(budget: StepBudget, decode_s: float, token_s: float, steps: int = 60) -> int:
    """Let steps of four sequences and a prompt happen as they would; return the last piece."""
    for _ in range(10):
        budget.record(4, 0, decode_s)
    piece = 0
    for _ in range(steps):
        piece = budget.prompt_tokens(4, 1)
        budget.record(4, piece, decode_s + piece * token_s)
    return piece


@pytest.mark.parametrize(("decode_s", "token_s"), [(0.01, 0.0003), (0.1, 0.0016), (0.03, 1e-6)])
def test_mixed_steps_keep_the_pace(decode_s: float, token_s: float) -> None:
    piece = run(StepBudget(2048), decode_s, token_s)
    assert MIN_PIECE < piece <= 2048
    duration_s = decode_s + piece * token_s
    assert duration_s <= 1.01 * MAX_SLOWDOWN * decode_s
    assert piece == 2048 or duration_s > 0.9 * MAX_SLOWDOWN * decode_s


def test_prompts_go_on_however_slow() -> None:
    assert run(StepBudget(2048), 0.001, 0.01) == MIN_PIECE
    assert StepBudget(2).prompt_tokens(4, 1) == 2


def test_pieces_grow_step_by_step_and_follow_what_they_cost() -> None:
    budget = StepBudget(2048)
    for _ in range(5):
        budget.record(4, 0, 0.02)
    pieces = []
    for _ in range(8):
        pieces.append(budget.prompt_tokens(4, 1))
        budget.record(4, pieces[-1], 0.02 + pieces[-1] * 1e-4)
    assert pieces[0] == 8
    assert all(after <= 2 * before for before, after in itertools.pairwise(pieces))
    # With a longer context each token costs more.
    for _ in range(30):
        piece = budget.prompt_tokens(4, 1)
        budget.record(4, piece, 0.02 + piece * 4e-4)
    assert piece == pytest.approx((MAX_SLOWDOWN - 1) * 0.02 / 4e-4, rel=0.1)


def test_many_waiting_prompts_go_before_few_that_generate() -> None:
    budget = StepBudget(2048)
    run(budget, 0.02, 4e-4)
    few, many = budget.prompt_tokens(4, 1), budget.prompt_tokens(1, 15)
    assert many == 2 * few  # grows from the last piece


def test_prompts_alone_take_steps_of_bounded_time() -> None:
    budget = StepBudget(4096)
    assert budget.prompt_tokens(0, 3) == 256
    for _ in range(20):
        budget.record(0, 256, 256 * 0.002)
    assert budget.prompt_tokens(0, 3) == pytest.approx(MAX_PROMPT_STEP_S / 0.002, abs=1)
    for _ in range(60):
        budget.record(0, 256, 256 * 1e-6)
    assert budget.prompt_tokens(0, 1) == 4096
