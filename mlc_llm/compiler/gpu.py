"""From a model's entries to kernels of a GPU: the passes in order, and the sizes they plan for.

Kernels come without a schedule and are fused with their neighbours; rules of TVM's dlight bind them
to threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform
from tvm.s_tir import dlight

from mlc_llm.compiler.cuda_graphs import capture_entry
from mlc_llm.compiler.few_rows import ByRows
from mlc_llm.compiler.pipeline import temporary_bytes
from mlc_llm.kernels.cpu.sampling import sample

# The kernel that chooses tokens, which runs on the CPU: logits are read back in any case.
HOST_SAMPLE = "sample_on_host"

# Shapes of hidden states change without a kernel: the virtual machine makes a view.
_FUSE = [
    transform.LegalizeOps(skip_ops=["relax.reshape"]),
    transform.AnnotateTIROpPattern(),
    transform.FoldConstant(),
    transform.FuseOps(),
    transform.FuseTIR(),
    transform.DeadCodeElimination(),
]
_LOWER = [
    transform.ToNonDataflow(),
    transform.RemovePurityChecking(),
    transform.CallTIRRewrite(),
]
_LOWER_TO_VM = [
    transform.LowerAllocTensor(),
    transform.KillAfterLastUse(),
    transform.LowerRuntimeBuiltin(),
    transform.ComputePrimValue(),
    transform.VMShapeLower(),
    transform.AttachGlobalSymbol(),
]


def gpu_phases(
    bounds: Mapping[str, int], captured: str | None = None, *, is_web: bool = False
) -> list[tuple[str, list[Any]]]:
    """Return named phases of passes; `bounds` limits symbolic sizes for memory planning.

    captured: the entry whose kernels become a CUDA graph. is_web: the library is for a browser,
    which makes all kernels when it loads one: there are none for few rows then, with which a
    WebGPU that computes on the CPU lost its device (Chromium's SwiftShader, q4f32_1).
    """
    capture = [] if captured is None else [("capture", [capture_entry(captured)])]
    return [
        ("fuse", [bound_all_sizes(bounds), *_FUSE]),
        ("schedule", [schedule_rules(has_few_rows=not is_web)]),
        ("lower", _LOWER),
        ("plan_memory", [transform.StaticPlanBlockMemory()]),
        *capture,
        ("lower_to_vm", _LOWER_TO_VM),
    ]


def schedule_rules(*, has_few_rows: bool = True) -> Any:
    """Return the pass that binds kernels to threads, each by the first rule that fits.

    has_few_rows: products with few rows have kernels of their own, chosen at run time.
    """
    rules = dlight.gpu
    return dlight.ApplyDefaultSchedule(
        ByRows(_Products()) if has_few_rows else _Products(),
        _Careful(rules.GEMV()),
        _Careful(rules.Reduction()),
        rules.GeneralReduction(),
        rules.Fallback(),
    )


class _Products(dlight.gpu.Matmul):  # type: ignore[misc]
    """TVM's rule for products of many rows, with tensor cores where their tiles fit."""

    def apply(self, func: Any, target: tvm.target.Target, tunable: bool) -> Any:
        """Return a schedule, None where the next rule is to be asked."""
        # A T4's blocks have 64 KiB of shared memory, tiles for tensor cores take 72.
        if target.kind.name == "cuda" and target.attrs["arch"] == "sm_75":
            func = func.with_attr("dlight.do_not_tensorize", True)
        return super().apply(func, target, tunable)


class _Careful(dlight.ScheduleRule):  # type: ignore[misc]
    """A rule of TVM's that leaves weights of two words or scales at once, on which it fails."""

    def __init__(self, rule: Any) -> None:
        self._rule = rule

    def apply(self, func: Any, target: tvm.target.Target, tunable: bool) -> Any:
        """Return a schedule, None where the next rule is to be asked."""
        try:
            return self._rule.apply(func, target, tunable)
        except AssertionError:
            return None


def sample_on_host(target: tvm.target.Target) -> Any:
    """Return the kernel that chooses tokens, for the CPU that a GPU goes with."""
    attributes = {
        "global_symbol": HOST_SAMPLE,
        "target": target.host,
        "tirx.is_scheduled": True,
    }
    return sample().with_attr(attributes)


def bound_all_sizes(bounds: Mapping[str, int]) -> Any:
    """Return a pass that tells the memory planner the largest symbolic sizes of all functions."""

    @tvm.transform.module_pass(opt_level=0, name="BoundAllSizes")  # type: ignore[untyped-decorator]
    def attach(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        for var, function in mod.functions_items():
            if isinstance(function, relax.Function):
                mod[var] = function.with_attr("tir_var_upper_bound", dict(bounds))
        return mod

    return attach


def temporary_of_all(mod: tvm.IRModule) -> dict[str, int]:
    """Return the bytes of temporary tensors by planned function, those that have any."""
    found = {
        str(var.name_hint): temporary_bytes(mod, var.name_hint)
        for var, function in mod.functions_items()
        if isinstance(function, relax.Function)
    }
    return {name: size for name, size in found.items() if size}
