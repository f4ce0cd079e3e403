"""Attention on tensor cores: what its CUDA source computes, and its machine code."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_steps import PAGE, RAGGED, Step
from cuda_on_cpu import run, translate

from mlc_llm.compiler.cuda_code import assemble
from mlc_llm.kernels.cpu.attention_pages import AttentionShape
from mlc_llm.kernels.gpu.attention import paged_attention
from mlc_llm.kernels.gpu.attention_scores import BlockLimits
from mlc_llm.kernels.gpu.tensor_cores import tensor_cores

LIMITS = BlockLimits(shared_bytes=49152, load_bytes=16, max_parts=4)
# Weights are rounded to float16, and so is the result.
TOLERANCE = 4e-3

GQA = AttentionShape(8, 2, 32, PAGE, "float16", 0.2, -1)
SHAPES = {
    "groups of 3, window longer than a block": AttentionShape(3, 1, 64, PAGE, "float16", 0.125, 70),
    "no groups, soft cap": AttentionShape(2, 2, 48, PAGE, "float16", 0.1, -1, soft_cap=3),
    "alibi, wide heads": AttentionShape(6, 3, 160, PAGE, "float16", 0.1, -1, alibi=True),
    "groups larger than a tile, sinks over blocks": AttentionShape(
        70, 1, 16, PAGE, "float16", 0.25, 3, sinks=67
    ),
    "chunks": AttentionShape(2, 1, 32, PAGE, "float16", 0.15, 24, is_chunked=True),
}
# What blocks may take so that a multiprocessor has two, of the least that it has of each.
REGISTERS, SHARED_BYTES = 65536 // 2, {"sm_75": 32 << 10, "sm_80": 49152, "sm_90": 49152}


def kernel_of(
    shape: AttentionShape, architecture: str, dtype: str = "float16", sink_dtype: str | None = None
) -> Any:
    return paged_attention(shape, dtype, sink_dtype, LIMITS, tensor_cores(architecture))


def attend(
    step: Step, directory: Path, architecture: str, sink_logits: np.ndarray | None = None
) -> np.ndarray:
    """Return what the kernel for an architecture makes of a step, (n, heads, head_dim)."""
    sink_dtype = None if sink_logits is None else str(sink_logits.dtype)
    kernel = kernel_of(step.shape, architecture, step.dtype, sink_dtype)
    tensors = step.tensors(LIMITS.max_parts, sink_logits)
    found = run(kernel, architecture, directory, **tensors)["out"]
    return found.reshape(step.q.shape)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((name, "float16") for name in SHAPES), ("chunks", "bfloat16")]
)
def test_attention(shape, dtype, tmp_path) -> None:
    step = Step(SHAPES[shape], RAGGED, dtype)
    found = attend(step, tmp_path, "sm_80").astype(np.float64)
    tolerance = TOLERANCE if dtype == "float16" else 2 * TOLERANCE
    np.testing.assert_allclose(found, step.expected(), atol=tolerance, rtol=tolerance)


def test_older_instructions_and_sink_logits(tmp_path) -> None:
    # Some take nothing, some everything.
    logits = np.array([-200, 3, 200, 0, -1, 2, 1, 5], np.float32)
    step = Step(dataclasses.replace(GQA, window=24, sinks=4), RAGGED, "float16")
    found = attend(step, tmp_path, "sm_75", logits).astype(np.float64)
    np.testing.assert_allclose(found, step.expected(logits), atol=TOLERANCE, rtol=TOLERANCE)


def test_tokens_do_not_depend_on_what_is_beside_them(tmp_path) -> None:
    shape = AttentionShape(4, 1, 32, PAGE, "float16", 0.2, 50, sinks=3)
    whole = Step(shape, [(340, 41)], "float16")
    together = attend(whole, tmp_path, "sm_80")
    # The same tokens in pieces, beside each other; the first token is left away.
    pieces = [(1, 7), (7, 8), (8, 33), (33, 41)]
    part = copy.copy(whole)
    part.query_start = np.array([0, *(end - 1 for _, end in pieces)], np.int32)
    part.page_table = np.repeat(whole.page_table, len(pieces), axis=0)
    part.positions, part.q = whole.positions[1:], whole.q[1:]
    part.work = [(299 + end, end - begin) for begin, end in pieces]
    np.testing.assert_array_equal(attend(part, tmp_path, "sm_80"), together[1:])


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("sm_90", AttentionShape(32, 8, 128, PAGE, "float16", 0.09, -1)),
        ("sm_80", AttentionShape(8, 4, 256, PAGE, "float16", 0.06, 4096, soft_cap=50)),
        ("sm_75", AttentionShape(32, 8, 128, PAGE, "float16", 0.09, -1)),
    ],
)
def test_machine_code_multiplies_on_tensor_cores(architecture, shape) -> None:
    source, _ = translate(kernel_of(shape, architecture), architecture)
    (name,) = re.findall(
        r"void __launch_bounds__\(128\) (\w+)\([^)]*query_start_ptr[^)]*\) {", source
    )
    others, body = source.index('extern "C"'), source.rindex('extern "C"')
    source = source[:others] + source[body:]
    taken = assemble(source, architecture).resources()[name]
    assert not taken.spilled_bytes
    assert 0 < 128 * taken.registers <= REGISTERS
    assert taken.shared_bytes <= SHARED_BYTES[architecture]
    # Scores and results: a product for each 16 items of a head, 8 keys and 16 rows, twice.
    keys = 64 if shape.head_dim <= (64 if architecture == "sm_75" else 128) else 32
    assert source[others:].count("multiply_add(") == 2 * shape.head_dim * keys // 128
    assert ("m16n8k8" if architecture == "sm_75" else "m16n8k16") in source
    assert ("cp.async" in source) == (architecture != "sm_75")


@pytest.mark.parametrize(
    ("architecture", "shape", "dtype"),
    [
        ("sm_70", GQA, "float16"),
        ("sm_80", dataclasses.replace(GQA, head_dim=24), "float16"),
        ("sm_80", dataclasses.replace(GQA, kv_dtype="float32"), "float16"),
        ("sm_80", GQA, "float32"),
        ("sm_75", dataclasses.replace(GQA, head_dim=160), "float16"),
    ],
)
def test_others_do_without(architecture, shape, dtype) -> None:
    assert "mma" not in translate(kernel_of(shape, architecture, dtype), architecture)[0]
