"""Kernels of recurrent layers as CUDA source: sums of a token that warps have parts of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from cuda_on_cpu import run
from recurrence_steps import STEPS, Run, check_gated_delta_rule, check_wkv

from mlc_llm.kernels.cpu.delta_rule import DeltaShape


@pytest.fixture
def on_cuda(tmp_path: Path) -> Run:
    return partial(run, architecture="sm_80", directory=tmp_path)


def test_wkv(on_cuda: Run) -> None:
    check_wkv(on_cuda, "float16", STEPS["ragged"], 128, True)


def test_gated_delta_rule(on_cuda: Run) -> None:
    check_gated_delta_rule(on_cuda, "float16", STEPS["ragged"], DeltaShape(1, 2, 96, 40))
