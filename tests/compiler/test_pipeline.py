"""The passes one by one: each leaves a well-formed module, and packing moves out of `forward`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tvm
import tvm_ffi
from reference_cases import get_case
from tvm import relax

from mlc_llm.compiler.pipeline import PACK_FUNCTION, phases, temporary_bytes
from mlc_llm.compiler.target import describe_target
from mlc_llm.kernels.cpu.isa import find_isa
from mlc_llm.models.registry import find_family
from mlc_llm.quantization.apply import build_quantized
from mlc_llm.quantization.schemes import get_scheme

MODELS = [
    ("llama_gqa", "q0f32", False),
    ("llama_odd_sizes", "q4f16_1", True),
    ("llama_tied", "q4f16_1", False),
    ("llama_tied", "q8f16_1", True),
    ("mistral_sliding_window", "q3f16_1", True),
    ("qwen2_gqa", "q4bf16_0", True),
]
ALLOC_TENSOR = tvm.ir.Op.get("relax.memory.alloc_tensor")
BOUNDS = {"n": 32, "b": 4, "num_starts": 5, "r": 4}


@functools.cache
def export(name: str, quantization: str, is_int8: bool = False) -> tvm.IRModule:
    described = describe_target("cpu", "O2")
    config = get_case(name).config()
    family = find_family(config)
    isa = find_isa(described["isa"]).name if is_int8 else None
    scheme = get_scheme(quantization)
    model = build_quantized(family, family.config_from_huggingface(config), scheme, isa)
    with tvm.target.Target(described["target"]):
        mod, _ = model.export_tvm(model.export_spec())
    return mod


def run_phases(mod: tvm.IRModule, last: str, bounds: dict[str, int] = BOUNDS) -> tvm.IRModule:
    with tvm.target.Target(describe_target("cpu", "O2")["target"]):
        for name, passes in phases(bounds):
            mod = tvm.transform.Sequential(passes)(mod)
            if name == last:
                return mod
    raise KeyError(last)


def called(function: Any) -> list[str]:
    """Return the names of the kernels that a Relax function calls, once a call."""
    names: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call):
            names.extend(arg.name_hint for arg in node.args if isinstance(arg, tvm.ir.GlobalVar))

    relax.analysis.post_order_visit(function, visit)
    return names


@pytest.mark.cpu
@pytest.mark.parametrize(("name", "quantization", "is_int8"), MODELS)
def test_every_pass_leaves_a_well_formed_module(name, quantization, is_int8) -> None:
    mod = export(name, quantization, is_int8)
    assert relax.analysis.check_well_formed(mod)
    with tvm.target.Target(describe_target("cpu", "O2")["target"]):
        for phase, passes in phases(BOUNDS):
            for step in passes:
                mod = step(mod)
                assert relax.analysis.check_well_formed(mod), f"{step.info.name} in {phase}"


@pytest.mark.cpu
@pytest.mark.parametrize(("name", "quantization", "is_int8"), MODELS)
def test_packing_is_lifted(name, quantization, is_int8) -> None:
    mod = export(name, quantization, is_int8)
    before = [kernel for kernel in called(mod["forward"]) if kernel.startswith("pack_")]
    assert before
    mod = run_phases(mod, "lift_packing")
    assert not [kernel for kernel in called(mod["forward"]) if kernel.startswith("pack_")]
    lifted = called(mod[PACK_FUNCTION])
    assert lifted and all(kernel.startswith("pack_") for kernel in lifted)
    assert mod[PACK_FUNCTION].attrs["global_symbol"] == PACK_FUNCTION
    assert {var.name_hint for var in mod.functions} >= {"forward", PACK_FUNCTION, *lifted}


@pytest.mark.cpu
def test_a_tied_table_is_packed_once() -> None:
    mod = export("llama_tied", "q4f16_1")
    # Four linears in each of two layers; the table is looked up and multiplied with.
    assert count_packing(mod["forward"]) == 2 * 4 + 2
    assert count_packing(run_phases(mod, "lift_packing")[PACK_FUNCTION]) == 2 * 4 + 1


def count_packing(function: Any) -> int:
    """Return how many quantized weights a function packs: words and scales of each."""
    kernels = [kernel.rstrip("0123456789") for kernel in called(function)]
    words = sum(kernel.startswith("pack_words") for kernel in kernels)
    assert words == sum(kernel.startswith("pack_scales") for kernel in kernels)
    return words


@pytest.mark.cpu
def test_parameters_come_last_as_a_tuple() -> None:
    mod = export("llama_gqa", "q0f32")
    num_parameters = len(mod["forward"].params)
    forward = run_phases(mod, "lift_packing")["forward"]
    names = [param.name for param in forward.params]
    assert names[:7] == [
        "token_ids",
        "positions",
        "query_start",
        "slots",
        "page_table",
        "context_len",
        "logit_rows",
    ]
    assert len(forward.params) == 9 < num_parameters
    assert len(forward.params[-1].ty.fields) == num_parameters - 8


@pytest.mark.cpu
def test_temporary_memory_follows_the_bounds() -> None:
    def planned(n: int) -> int:
        bounds = {"n": n, "b": 4, "num_starts": 5, "r": 4}
        return temporary_bytes(
            run_phases(export("llama_gqa", "q0f32"), "plan_memory", bounds), "forward"
        )

    small, large = planned(32), planned(320)
    # 64 hidden and 64 + 64 feed-forward values of float32 a token are the least there can be.
    assert 32 * 64 * 4 < small < large
    assert large - small > (320 - 32) * (64 + 128) * 4


@pytest.mark.parametrize(("name", "quantization", "is_int8"), MODELS)
def test_views_of_planned_memory_are_made_once(name: str, quantization: str, is_int8: bool) -> None:
    planned = run_phases(export(name, quantization, is_int8), "plan_memory")
    views: list[Any] = []
    num_kernels = 0

    def visit(node: Any) -> None:
        nonlocal num_kernels
        if isinstance(node, relax.Call) and node.op.same_as(ALLOC_TENSOR):
            views.append(node)
        num_kernels += isinstance(node, relax.Call) and isinstance(node.op, tvm.ir.GlobalVar)

    relax.analysis.post_order_visit(planned["forward"], visit)
    repeated = [
        view
        for index, view in enumerate(views)
        if any(tvm_ffi.structural_equal(view, earlier) for earlier in views[:index])
    ]
    # Layers repeat: there are as many views as in one, not as kernels in all.
    assert not repeated
    assert 0 < len(views) < num_kernels
