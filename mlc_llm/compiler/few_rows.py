"""Which kernel a product with weights takes on a GPU: by the number of rows, known at run time.

A kernel whose number of rows is symbolic gets several launches, and the host chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from mlc_llm.kernels.gpu.linear_few import few_rows_grid, few_rows_product
from mlc_llm.kernels.gpu.linear_tensor import tensor_grid, tensor_product
from mlc_llm.kernels.gpu.product import Product, take_apart
from mlc_llm.kernels.gpu.tensor_cores import tensor_cores

# Rows that threads multiply with a weight in turn; more, up to so many, have blocks of their own.
_BUCKETS = (4, 8)
_MOST_ROWS = 32
# Rows that tensor cores multiply with weights which are read once.
_TENSOR_BUCKETS = (8, 16, 32, 64)
_LOAD_BYTES = {"cuda": 16}


class ByRows(dlight.ScheduleRule):  # type: ignore[misc]
    """A rule for many rows, and kernels of ours for few."""

    def __init__(self, many: Any) -> None:
        self._many = many

    def apply(self, func: Any, target: tvm.target.Target, tunable: bool) -> Any:
        """Return a schedule, None where the next rule is to be asked."""
        many = self._many.apply(func, target, tunable)
        product = take_apart(func)
        if many is None or product is None or not isinstance(product.num_rows, tvm.ir.Var):
            return many
        launches = _few_rows(product, target)
        if not launches:
            return many
        return s_tir.Schedule(_choose(func, product.num_rows, launches, many.mod["main"].body))


def _few_rows(product: Product, target: tvm.target.Target) -> list[tuple[int, Any]]:
    """Return launches for few rows, each after the most rows that it is for."""
    launches = _on_tensor_cores(product, target)
    if launches:
        return launches
    load_bytes = _LOAD_BYTES.get(target.kind.name, 8)
    for rows in _BUCKETS:
        grid = few_rows_grid(product, rows, load_bytes)
        if grid is not None:
            most = _MOST_ROWS if rows == _BUCKETS[-1] else rows
            launches.append((most, few_rows_product(product, grid)))
    return launches


def _on_tensor_cores(product: Product, target: tvm.target.Target) -> list[tuple[int, Any]]:
    """Return such launches on tensor cores, none where GPU or product have no use of them."""
    cores = tensor_cores(str(target.attrs["arch"])) if target.kind.name == "cuda" else None
    if cores is None:
        return []
    grids = [tensor_grid(product, rows) for rows in _TENSOR_BUCKETS]
    return [(grid.rows, tensor_product(product, grid, cores)) for grid in grids if grid is not None]


def _choose(kernel: Any, num_rows: Any, few: Sequence[tuple[int, Any]], many: Any) -> Any:
    """Return a kernel that starts the first launch whose most rows are not less than it has."""
    chosen = tirx.Evaluate(0)
    for most, launch in reversed(few):
        chosen = tirx.IfThenElse(num_rows <= most, launch, chosen)
    # Barriers, which TVM finds for itself in what a rule made, it puts into no branch: not even
    # into one of the host. In a loop of one turn, or of none, it does.
    turns = tirx.Select(num_rows > few[-1][0], tirx.const(1, "int32"), tirx.const(0, "int32"))
    rest = tirx.For(tirx.Var("turn", "int32"), 0, turns, tirx.ForKind.SERIAL, many)
    root = s_tir.SBlock([], [], [], "root", tirx.SeqStmt([chosen, rest]))
    return kernel.with_body(s_tir.SBlockRealize([], True, root))
