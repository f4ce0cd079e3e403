"""The passes a model goes through, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
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
_LOWER_TO_VM = [
    transform.LowerAllocTensor(),
    transform.LowerRuntimeBuiltin(),
    transform.ComputePrimValue(),
    transform.VMShapeLower(),
    transform.AttachGlobalSymbol(),
]


def phases(
    bounds: Mapping[str, int], entry: str = "forward", others: Sequence[str] = ()
) -> list[tuple[str, list[Any]]]:
    """Return named phases of passes.

    `bounds` limits the symbolic sizes of `entry`, which runs a step, for memory planning. others:
    further entries that read weights.
    """
    lift = lift_packing(entry, others)
    return [
        ("lift_packing", [*_SHARE_PACKING, lift, bound_sizes(bounds, entry)]),
        ("lower", _LOWER),
        ("plan_memory", [transform.StaticPlanBlockMemory(), share_views(entry)]),
        ("lower_to_vm", _LOWER_TO_VM),
    ]


def lift_packing(entry: str, others: Sequence[str] = ()) -> Any:
    """Return a pass: what depends on weights alone moves into `pack_params`, tuple -> tuple.

    With others, the result begins with what `entry` takes and goes on with what each of them does.
    """

    @tvm.transform.module_pass(opt_level=0, name="LiftPacking")  # type: ignore[untyped-decorator]
    def lift(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        kernels = {
            var: func for var, func in mod.functions.items() if isinstance(func, tvm.tirx.PrimFunc)
        }
        functions = dict(mod.functions.items())
        packs = []
        for name in (entry, *others):
            step = mod.get_global_var(name)
            lifted = transform.LiftTransformParams()(tvm.IRModule({**kernels, step: mod[name]}))
            packs.append(lifted[f"{name}_transform_params"].without_attr("num_input"))
            bundled = transform.BundleModelParams()(tvm.IRModule({name: lifted[name]}))
            functions[step] = bundled[name]
        if not others:
            pack = packs[0].with_attr("global_symbol", PACK_FUNCTION)
            functions[tvm.ir.GlobalVar(PACK_FUNCTION)] = pack
            return tvm.IRModule(functions, attrs=mod.attrs)
        return _pack_in_turn(tvm.IRModule(functions, attrs=mod.attrs), packs)

    return lift


def _pack_in_turn(mod: tvm.IRModule, packs: Sequence[relax.Function]) -> tvm.IRModule:
    """Add `pack_params`, whose result is those of several functions of the same parameters."""
    builder = relax.BlockBuilder(mod)
    parameters = relax.Var("params", packs[0].params[0].ty)
    names = [
        builder.add_func(pack.with_attr("global_symbol", name), name)
        for pack, name in ((pack, f"{PACK_FUNCTION}_{i}") for i, pack in enumerate(packs))
    ]
    with builder.function(PACK_FUNCTION, [parameters]):
        results = [builder.emit(relax.Call(name, [parameters])) for name in names]
        items = [
            builder.emit(relax.TupleGetItem(result, index))
            for result in results
            for index in range(len(result.ty.fields))
        ]
        builder.emit_func_output(relax.Tuple(items))
    return builder.get()


def num_packed(mod: tvm.IRModule, entry: str) -> int:
    """Return how many packed parameters an entry takes."""
    return len(mod[entry].params[-1].ty.fields)


def bound_sizes(bounds: Mapping[str, int], entry: str) -> Any:
    """Return a pass that tells the memory planner the largest symbolic sizes of a function."""

    @tvm.transform.module_pass(opt_level=0, name="BoundSizes")  # type: ignore[untyped-decorator]
    def attach(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        function = mod[entry].with_attr("tir_var_upper_bound", dict(bounds))
        mod.update_func(mod.get_global_var(entry), function)
        return mod

    return attach


def share_views(entry: str) -> Any:
    """Return a pass that makes each tensor in planned storage once and uses it for all layers.

    Such a tensor is a view: of storage, offset, shape and dtype. Planning makes one for every
    result, which took the virtual machine a tenth of a small model's decode step.
    """

    @tvm.transform.module_pass(opt_level=0, name="ShareViews")  # type: ignore[untyped-decorator]
    def share(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        variable = mod.get_global_var(entry)
        mod.update_func(variable, _ViewSharer().visit_expr(mod[entry]))
        return mod

    return share


@relax.expr_functor.mutator
class _ViewSharer(relax.PyExprMutator):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self._views: dict[Any, list[Any]] = {}  # storage -> bindings of its views

    def visit_var_binding_(self, binding: Any) -> None:
        """Replace a view by an earlier equal one."""
        call = binding.value
        if isinstance(call, relax.Call) and call.op == tvm.ir.Op.get("relax.memory.alloc_tensor"):
            views = self._views.setdefault(call.args[0], [])
            for earlier in views:
                if tvm_ffi.structural_equal(earlier.value, call):
                    self.set_var_remap(binding.var, self.visit_expr(earlier.var))
                    return
            views.append(binding)
        super().visit_var_binding_(binding)


def temporary_bytes(mod: tvm.IRModule, function: str) -> int:
    """Return the bytes of storage that a planned function allocates for itself."""
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, relax.Call) and node.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            total += int(node.args[0].values[0])

    relax.analysis.post_order_visit(mod[function], visit)
    return total
