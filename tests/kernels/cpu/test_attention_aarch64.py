"""Attention as AArch64 code, run by an emulator."""

import pytest
from aarch64_emulator import Emulator, missing_program
from attention_cases import DECODE, RAGGED, SHAPES, check_against_dense, check_independence

from mlc_llm.kernels.cpu.attention import paged_attention

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(missing_program() is not None, reason=str(missing_program())),
]


@pytest.mark.parametrize(
    "name", ["gqa float16", "odd sizes", "window and sinks", "int8", "few registers"]
)
def test_steps_do_not_matter(rng, tmp_path, name):
    kernel = Emulator("aarch64", tmp_path).build(paged_attention(SHAPES[name]))
    for work in (RAGGED, DECODE):
        check_against_dense(kernel, rng, SHAPES[name], work)
    check_independence(kernel, rng, SHAPES[name])
