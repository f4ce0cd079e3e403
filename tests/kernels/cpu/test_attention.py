"""Paged attention against a dense softmax in NumPy, and against itself in other steps."""

import pytest
from attention_cases import (
    DECODE,
    RAGGED,
    SHAPES,
    SINK_LOGITS,
    check_against_dense,
    check_independence,
    make_sink_logits,
)
from int8_cases import runnable_devices

from mlc_llm.kernels.cpu.attention import paged_attention

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module", params=SHAPES)
def compiled(request, build):
    """A shape and its kernel."""
    shape = SHAPES[request.param]
    return shape, build(paged_attention(shape))


def test_equals_dense_attention(compiled, rng):
    shape, kernel = compiled
    for work in (RAGGED, DECODE, [(1, 1)], [(150, 150)]):
        check_against_dense(kernel, rng, shape, work)


def test_a_token_does_not_depend_on_its_step(compiled, rng):
    shape, kernel = compiled
    check_independence(kernel, rng, shape)


@pytest.mark.parametrize("name", SINK_LOGITS)
def test_a_sink_is_one_more_score_without_a_value(build, rng, name):
    shape, dtype = SINK_LOGITS[name]
    kernel = build(paged_attention(shape, dtype))
    logits = make_sink_logits(rng, shape, dtype)
    # Tiles, single tokens, and single tokens whose keys are dealt out in parts.
    for work in (RAGGED, DECODE):
        check_against_dense(kernel, rng, shape, work, logits)
    check_independence(kernel, rng, shape, logits)


@pytest.mark.parametrize("device", runnable_devices())
def test_instruction_sets(build_for, rng, device):
    for name in ("gqa float16", "int8, odd sizes", "few registers"):
        kernel = build_for(device)(paged_attention(SHAPES[name]))
        check_against_dense(kernel, rng, SHAPES[name], RAGGED)
        check_independence(kernel, rng, SHAPES[name])
