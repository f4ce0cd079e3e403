"""CUDA graphs: what starts many kernels at once. Nothing here is for one model or one kernel.

A graph is what TVM's runtime records when the captured function first runs, and starts from then
on. It remembers addresses: each tensor that a captured entry is given has to lie where it lay at
the first call of the same sizes; the runtime places them so (`GPUMemory.place_fixed`).
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform


def capture_entry(name: str) -> Any:
    """Return a pass that moves an entry's kernels into a function that is recorded as a graph.

    The last kernel, whose result is the caller's, stays outside. Temporary tensors of the entry are
    kept between calls. Goes after memory planning.
    """

    @tvm.transform.module_pass(opt_level=0, name="CaptureEntry")  # type: ignore[untyped-decorator]
    def capture(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        entry = mod.get_global_var(name)
        function = mod[entry]
        sizes = [str(size.name) for size in relax.analysis.defined_symbolic_vars(function)]
        # No argument changes its place, and for other sizes another graph is recorded.
        attributes = {"num_input": 0, "relax.rewrite_cuda_graph.capture_symbolic_vars": sizes}
        alone = tvm.IRModule(
            {
                var: other
                for var, other in mod.functions_items()
                if isinstance(other, tvm.tirx.PrimFunc)
            }
        )
        alone[entry] = function.with_attrs(attributes)
        with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
            alone = transform.RewriteCUDAGraph()(alone)
        for var, made in alone.functions_items():
            mod[var] = made
        return mod

    return capture
