"""The passes a model goes through, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform

PACK_FUNCTION = "pack_params"

# Phase -> passes. Each phase is one file of a debug dump.
_SHARE_PACKING = [transform.EliminateCommonSubexpr()]
_LOWER = [
    transform.LegalizeOps(),
    transform.ToNonDataflow(),
    transform.RemovePurityChecking(),
    transform.CallTIRRewrite(),
    transform.CanonicalizeBindings(),
]
_PLAN_MEMORY = [transform.StaticPlanBlockMemory()]
_LOWER_TO_VM = [
    transform.LowerAllocTensor(),
    transform.LowerRuntimeBuiltin(),
    transform.ComputePrimValue(),
    transform.VMShapeLower(),
    transform.AttachGlobalSymbol(),
]


def phases(bounds: Mapping[str, int], entry: str = "forward") -> list[tuple[str, list[Any]]]:
    """Return named phases of passes.

    `bounds` limits the symbolic sizes of `entry`, which runs a step, for memory planning.
    """
    return [
        ("lift_packing", [*_SHARE_PACKING, lift_packing(entry), bound_sizes(bounds, entry)]),
        ("lower", _LOWER),
        ("plan_memory", _PLAN_MEMORY),
        ("lower_to_vm", _LOWER_TO_VM),
    ]


def lift_packing(entry: str) -> Any:
    """Return a pass: what depends on weights alone moves into `pack_params`, tuple -> tuple."""

    @tvm.transform.module_pass(opt_level=0, name="LiftPacking")  # type: ignore[untyped-decorator]
    def lift(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        kernels = {
            var: func for var, func in mod.functions.items() if isinstance(func, tvm.tirx.PrimFunc)
        }
        step = mod.get_global_var(entry)
        lifted = transform.LiftTransformParams()(tvm.IRModule({**kernels, step: mod[entry]}))
        pack = lifted[f"{entry}_transform_params"].without_attr("num_input")
        bundled = transform.BundleModelParams()(tvm.IRModule({entry: lifted[entry]}))
        functions = dict(mod.functions.items())
        functions[step] = bundled[entry]
        functions[tvm.ir.GlobalVar(PACK_FUNCTION)] = pack.with_attr("global_symbol", PACK_FUNCTION)
        return tvm.IRModule(functions, attrs=mod.attrs)

    return lift


def bound_sizes(bounds: Mapping[str, int], entry: str) -> Any:
    """Return a pass that tells the memory planner the largest symbolic sizes of a function."""

    @tvm.transform.module_pass(opt_level=0, name="BoundSizes")  # type: ignore[untyped-decorator]
    def attach(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        function = mod[entry].with_attr("tir_var_upper_bound", dict(bounds))
        mod.update_func(mod.get_global_var(entry), function)
        return mod

    return attach


def temporary_bytes(mod: tvm.IRModule, function: str) -> int:
    """Return the bytes of storage that a planned function allocates for itself."""
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, relax.Call) and node.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            total += int(node.args[0].values[0])

    relax.analysis.post_order_visit(mod[function], visit)
    return total
